"""Scorer that runs a command of the user's: `--score-cmd 'CMD {model}'`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pome.errors import ScoreError, SpecError, printable
from pome.sweeping.scorers.base import Score, Scored, is_mean, read_finite

# A number is a whole run of letters, digits and dots; the sign of an exponent parts two runs. Each pattern can match in
# one way only, so that reading takes no longer than the output is long.
RUN = re.compile(r"[\w.]+")
NUMBER = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e\d+)?|nan|inf(?:inity)?)\.*", re.I | re.A)
MANTISSA = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)e", re.I | re.A)
EXPONENT = re.compile(r"(\d+)\.*", re.A)
MOST_OUTPUT = 64 << 20  # bytes of a command's output that are looked at, from the end
LAST_OUTPUT = 1 << 20  # characters of it in which a number is looked for that is not in JSON


@dataclass(frozen=True)
class CommandScorer:
    """`command` run by the shell with {model} replaced; its last number counts, or JSON with `score`.

    JSON may hold `examples` (a number for each example, of which the score is the mean), `weights` of them, and
    `metrics`, other numbers to be shown. `timeout` is in seconds.
    """

    command: str
    minimize: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if "{model}" not in self.command:
            raise SpecError(f"score_cmd: {printable(self.command)!r} has no {{model}}; write 'CMD {{model}}'")

    def describe(self) -> dict[str, Any]:
        return {"score_cmd": self.command, "minimize": self.minimize}

    def score_folder(self, path: Path) -> Score:
        line = self.command.replace("{model}", shlex.quote(str(path)))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # A session of its own, so that a command that hangs is ended with all that it started.
            process = subprocess.Popen(
                line, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
            try:
                status = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise ScoreError(f"the command took longer than {self.timeout:g} seconds") from None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status:
                last = _read_end(err).strip().splitlines()[-1:] or [""]
                ended = f"was ended by signal {-status}" if status < 0 else f"left with exit status {status}"
                raise ScoreError(f"the command {ended}: {printable(last[0])}".rstrip(": "))
            return read_score(_read_end(out))


def _read_end(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MOST_OUTPUT))
    return file.read().decode("utf-8", "replace")


def read_score(text: str) -> Score:
    """The score in what a command printed. Raises ScoreError when there is none, or it is no finite number."""
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (text, lines[-1] if lines else ""):
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return _read_object(found)
    number = find_last_number(text[-LAST_OUTPUT:])
    if number is None:
        raise ScoreError("the command printed no number")
    return Score(Scored(read_finite(number, "the score")))


def find_last_number(text: str) -> float | None:
    """The last number in a text: `0.5.` ends a sentence and is one; `v2`, `1.2.3` and `0x1f` are none."""
    last: str | None = None
    before: re.Match[str] | None = None
    for run in RUN.finditer(text):
        at = run.start()
        power = EXPONENT.fullmatch(run[0]) if before and before.end() == at - 1 and text[at - 1] in "-+" else None
        if before and power and MANTISSA.fullmatch(before[0]):
            last = _find_sign(text, before.start()) + before[0] + text[at - 1] + power[1]
        elif found := NUMBER.fullmatch(run[0]):
            last = _find_sign(text, at) + found[1]
        before = run
    return None if last is None else float(last)


def _find_sign(text: str, at: int) -> str:
    """The sign of a number that begins at `at`; in `a-7` it is a hyphen."""
    if at and text[at - 1] in "-+" and not RUN.fullmatch(text, max(0, at - 2), at - 1):
        return text[at - 1]
    return ""


def _read_object(found: Mapping[str, Any]) -> Score:
    if "score" not in found:
        raise ScoreError("the command printed JSON without 'score'")
    value = read_finite(found["score"], "the score")
    examples, weights = (
        tuple(read_finite(item, key) for item in _as_list(found[key], key)) if found.get(key) is not None else None
        for key in ("examples", "weights")
    )
    metrics = found.get("metrics") or {}
    if not isinstance(metrics, dict):
        raise ScoreError("the command printed 'metrics' that are no object")
    named = {str(key): read_finite(item, f"metrics.{key}") for key, item in metrics.items()}
    if examples is not None and not is_mean(value, examples, weights):
        # Resampling them would give an interval of another number than the score: better none than a wrong one.
        examples = weights = None
    return Score(Scored(value, examples, weights if examples is not None else None), metrics=named)


def _as_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ScoreError(f"the command printed {what!r} that are no list")
    return value
