"""Journal of a sweep: its scores on disk, where the next run finds them. No torch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pome.output.durable import as_output_error, sync_file
from pome.sweeping.scorers.base import Score, Scored
from pome.sweeping.trials import Trial


@dataclass(frozen=True)
class Entry:
    """A line of the journal: a model's score, or why it has none."""

    score: Score | None
    failed: str | None
    seconds: float


class Journal:
    """The scores of a sweep, a JSON line each, synced as they come; the first line says of which command they are."""

    def __init__(self, path: Path, command: Mapping[str, Any], retry_failed: bool) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        head = {"command": dict(command)}
        lines = list(self._read())
        if lines and lines[0] == json.loads(json.dumps(head)):
            self.entries = {line["key"]: _read_entry(line) for line in lines[1:]}
            if retry_failed:
                self.entries = {key: entry for key, entry in self.entries.items() if entry.score is not None}
        else:
            lines = []
        # Written anew, without a line that a crash cut short and without failures to be tried again.
        kept = [line for line in lines[1:] if line["key"] in self.entries]
        made = path.with_suffix(".new")
        with as_output_error(path):
            with open(made, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in (head, *kept))
                file.flush()
                sync_file(file.fileno())
            os.replace(made, path)

    def find(self, key: str) -> Entry | None:
        return self.entries.get(key)

    def add(self, trial: Trial) -> None:
        line: dict[str, Any] = {"key": trial.key, "seconds": round(trial.seconds, 3), "failed": trial.failed}
        if trial.score is not None:
            line["score"] = dataclasses.asdict(trial.score)
        with as_output_error(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            sync_file(file.fileno())
        self.entries[trial.key] = Entry(trial.score, trial.failed, trial.seconds)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            text = self.path.read_text("utf-8")
        except (FileNotFoundError, UnicodeError):
            return
        for line in text.splitlines(keepends=True):
            try:
                found = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                found = None
            if not isinstance(found, dict):
                return
            yield found


def _read_entry(line: Mapping[str, Any]) -> Entry:
    raw = line.get("score")
    if raw is None:
        return Entry(None, str(line["failed"]), line["seconds"])
    score = Score(_read_scored(raw["scored"]), raw["train"] and _read_scored(raw["train"]), raw["metrics"])
    return Entry(score, None, line["seconds"])


def _read_scored(raw: Mapping[str, Any]) -> Scored:
    examples, weights = (tuple(raw[key]) if raw[key] is not None else None for key in ("examples", "weights"))
    return Scored(raw["value"], examples, weights)
