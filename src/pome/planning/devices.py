"""Names of this machine's devices, as rates are kept by. No torch."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from pome.planning.split import count_cores

_CPU = Path("/proc/cpuinfo")
_CARDS = Path("/proc/driver/nvidia/gpus")
_APPLE = ("Darwin", "arm64")


@dataclass(frozen=True)
class Device:
    """Hardware of an edit: a name such as `AMD EPYC (family 26, model 2), 2 cores` or `2 x NVIDIA A100-SXM4-80GB`."""

    name: str
    on_cpu: bool
    cores: int


def find_device(wanted: str) -> Device:
    """The device that `--device` means here, as far as the system tells without torch."""
    cores = count_cores()
    cards = _list_cards()
    if wanted.startswith("cuda:"):
        cards = cards[int(wanted[5:]) :][:1]
    if wanted == "mps" or (wanted == "auto" and not cards and (platform.system(), platform.machine()) == _APPLE):
        return Device(f"{_name_cpu()}, mps", False, cores)
    if wanted == "cpu" or (wanted == "auto" and not cards):
        return Device(f"{_name_cpu()}, {cores} core{'s' * (cores > 1)}", True, cores)
    if not cards:
        return Device("a CUDA device that the system does not name", False, cores)
    kinds = sorted(set(cards))
    return Device(" + ".join(f"{cards.count(k)} x {k}" if cards.count(k) > 1 else k for k in kinds), False, cores)


def parse_device(name: str) -> Device:
    """The device that a name of this module stands for, on whatever machine it is."""
    cores = re.search(r", (\d+) cores?$", name)
    return Device(name, cores is not None, int(cores[1]) if cores else 1)


def _name_cpu() -> str:
    """The processor's name; with family and model, by which alone those of virtual machines differ."""
    try:
        said = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", _CPU.read_text(), re.MULTILINE))
    except OSError:
        said = {}
    name = said.get("model name") or platform.processor() or platform.machine()
    family = f" (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= said.keys() else ""
    return f"{name.strip()}{family}"


def _list_cards() -> list[str]:
    """Names of the NVIDIA cards that CUDA_VISIBLE_DEVICES leaves, in the driver's order."""
    try:
        texts = [(card / "information").read_text() for card in sorted(_CARDS.iterdir())]
    except OSError:
        return []
    names = [found[1].strip() for text in texts if (found := re.search(r"^Model:(.*)$", text, re.MULTILINE))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    chosen = [index.strip() for index in visible.split(",") if index.strip() and index.strip() != "-1"]
    if all(index.isdecimal() for index in chosen):
        return [names[int(index)] for index in chosen if int(index) < len(names)]
    return names[: len(chosen)]
