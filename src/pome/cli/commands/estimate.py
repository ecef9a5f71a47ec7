"""`pome estimate`: what an edit would cost."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated

from pome.cli.console import make_console, print_lines, write_document
from pome.cli.options import AsJson, Base, Config, FineTuned, Given, Quiet
from pome.config.options import RUN, Option
from pome.config.preset import Preset, pick_edit_options
from pome.config.spec import EditSpec
from pome.config.yaml_text import make_spec

if TYPE_CHECKING:
    from pome.planning.devices import Device
    from pome.planning.rates import Rates
    from pome.planning.units import Plan

TAKES = (EditSpec, Preset)
EXAMPLES = (
    "pome estimate ./base ./fine-tuned",
    "pome estimate ./base ./fine-tuned --layers ffn --on this",
    "pome estimate ./base ./fine-tuned --on A100 --json",
)
THIS = "this"


def run(
    base: Base,
    ft: FineTuned,
    given: Given,
    config: Config = None,
    on: Annotated[
        str | None,
        Option(
            "this: measure this machine first, in seconds; or a measured device, by a part of its name.",
            more="Without it, rates of earlier runs here, else of the table of measured devices. Measuring writes two "
            "files of 128 MB to the current folder and removes them.",
            metavar="DEVICE",
            group=RUN,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tell before an edit what it would cost: operations, bytes, memory and time.

    It reads no weights. A device that nobody measured gets no time.
    """
    from pome.cli.tables.edit import describe_plan
    from pome.cli.tables.estimate import describe_cost, make_route_table
    from pome.editing.session import open_pair
    from pome.planning.devices import find_device, parse_device
    from pome.planning.rates import find_rates, match_device

    spec = make_spec(config, pick_edit_options(given, EditSpec), EditSpec)
    device = find_device(spec.device) if on in (None, THIS) else parse_device(match_device(str(on)))
    console = make_console(quiet)
    begun = time.perf_counter()
    with open_pair(base, ft, spec) as opened:
        planned = time.perf_counter() - begun
        print_lines(console, [describe_plan(opened)])
        rates = find_rates(device.name)
        if on == THIS:
            rates = measure_this(opened.plan, spec, device)
        cost = opened.estimate(spec, device, rates, planned)
    console.print(make_route_table(cost))
    print_lines(console, describe_cost(cost))
    if as_json:
        write_document([json.dumps(cost.to_json(), indent=1), "\n"])


def measure_this(plan: Plan, spec: EditSpec, device: Device) -> Rates:
    """This machine's rates for the costliest shapes of a plan, measured now and left for later estimates.

    Raises NumericalError for a device that is not there.
    """
    begun = time.perf_counter()
    from pome.editing.measurement import choose_probes, measure_device
    from pome.editing.run_rates import COMMAND_SECONDS
    from pome.editing.unit import list_devices
    from pome.planning.rates import find_rates, leave_rates

    loaded = time.perf_counter() - begun
    probes = choose_probes(plan.units)
    rates = measure_device(probes, list_devices(spec.device), device.cores, ".", 20.0)
    leave_rates(device.name, dataclasses.replace(rates, startup_seconds=COMMAND_SECONDS + loaded))
    return find_rates(device.name) or rates
