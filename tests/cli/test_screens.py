"""Screens of every command and of common errors, as a person sees them in terminals of two sizes.

The golden texts are in `screens/`. `POME_WRITE_SCREENS=1` writes them anew; look at the difference before it is
committed.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pome.planning.devices import find_device
from pome.planning.rates import Rates, leave_rates
from support.checkpoints import environment, llama_pair
from support.terminal import show_in_terminal

GOLDEN = Path(__file__).parent / "screens"
SIZES = ((80, 24), (120, 40))

# Each story is played in one folder that has `base` and `ft`, a command after the other.
STORIES = {
    "edit": [
        "edit base ft out --dry-run",
        "edit base ft out",
        "edit base ft out",
        "verify out --base base --ft ft",
        "edit base ft out --overwrite --layers ffn --rank-ratio 0.25 --dtype bfloat16",
        "verify out",
    ],
    "method": [
        "edit base ft out --method equivalence",
        "verify out --base base --ft ft --full",
        "edit base ft other --method equivalence --rank 4",
        "edit base ft other --method equivalence --out-format adapter",
    ],
    "inspect": ["inspect base ft", "inspect base ft --layers up --html report.html"],
    "weights": [
        "inspect base ft --layers ffn --weights --rank-ratio 0.25 --beta 1.5",
        "inspect base ft --scale mean",
        "inspect base ft --weights --rank 4 --rank-rule energy",
    ],
    "sweep": ["sweep base ft out --score-cmd 'echo 1; test {model}' --beta 1,2"],
    "estimate": ["estimate base ft", "estimate base ft --layers ffn --rank-ratio 0.25"],
    "extract": [
        "extract base ft adapter --rank 4 --dry-run",
        "extract base ft adapter --rank 4",
        "verify adapter --base base --ft ft",
        "extract base ft adapter",
    ],
    "batch": ["batch jobs.yaml", "batch variables.yaml"],
    "errors": [
        "edit base ft ft",
        "edit base ft base",
        "edit base nowhere out",
        "edit base ft out --scale frob",
        "edit base ft out --rank 10 --rank-ratio 0.5",
        "edit base ft out --rank-ratio 0",
        "edit base ft out --energy 0.5 --dry-run",
        "edit base ft out --device cuda:7",
        "edit base ft out --layers router",
        "edit base ft out --rnak 3",
        "edit base",
        "verify ft",
        "batch nothing.yaml",
    ],
}
RATES = Rates("2026-11-28, by runs here", 2.0, 1e9, 1e9, {"svd-float64": ((10.0, 1e9),)})
JOBS = """\
jobs:
  - {name: up, command: edit, base: base, fine_tuned: ft, out: up}
  - {name: down, command: edit, base: base, fine_tuned: nowhere, out: down}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path has the same length everywhere: lines that name it are broken by it."""
    with tempfile.TemporaryDirectory(prefix="pome-", dir="/tmp") as path:
        yield Path(path)


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "lines"), SIZES)
@pytest.mark.parametrize("story", STORIES)
def test_a_terminal_shows_the_golden_screens(
    folder: Path, story: str, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_pair(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the memory that is told depends on the cores
    leave_rates(find_device("auto").name, RATES)  # else the time of a dry run names this machine
    (folder / "jobs.yaml").write_text(JOBS)
    asked = JOBS.replace("base: base", "base: '${B}'").replace(": ft", ": '${F}'")
    (folder / "variables.yaml").write_text(f"variables:\n  B:\n  F:\n{asked}")
    seen = []
    for command in STORIES[story]:
        status, text = show_in_terminal(shlex.split(command), folder, columns, lines, environment())
        assert max(map(len, text.splitlines())) <= columns
        seen.append(f"$ pome {command}\n{text}exit status {status}\n")
    golden = GOLDEN / f"{story}-{columns}x{lines}.txt"
    if "POME_WRITE_SCREENS" in os.environ:
        golden.write_text("\n".join(seen))
    assert "\n".join(seen) == golden.read_text()
