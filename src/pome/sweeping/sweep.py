"""Sweep over options of an edit: score the candidates of one pair, and write the best if it is better beyond noise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.config.spec import EditSpec
from pome.editing.base_check import check_base
from pome.editing.edit import edit_pair
from pome.editing.session import Opened, Source, describe_command, open_pair, plan_pair
from pome.errors import ScoreError, VerificationError
from pome.manifest import Manifest, read_manifest
from pome.output.copying import count_space
from pome.output.progress import Progress
from pome.output.staging import Staging
from pome.output.target import SWEEP_SUFFIX, check_target
from pome.planning.units import Plan
from pome.sweeping.grid import BASE, FINE_TUNED, Candidate, Grid, walk
from pome.sweeping.journal import Journal
from pome.sweeping.models import Attempt, Models
from pome.sweeping.scorers.base import FolderScorer, ModelScorer
from pome.sweeping.trials import Listener, Outcome, Trial, measure_peak

if TYPE_CHECKING:
    from pome.sweeping.remote import RemoteScores


def sweep(
    base: Source,
    ft: Source,
    out: Source,
    grid: Grid,
    scorer: FolderScorer | ModelScorer,
    *,
    listener: Listener | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    write_best: bool = False,
    retry_failed: bool = False,
    card: bool = False,
    at_once: int | None = None,
) -> Outcome:
    """Scores of every candidate of `grid`, of the fine-tuned model and of BASE; the best is written to `out`.

    A candidate that cannot be made or scored is recorded as failed, and the sweep goes on. Scores are kept in
    `OUT.pome-sweep`, where the same call goes on, also with other lists in its grid. A sweep that ends without an
    output keeps them there.

    Args:
        base, ft, out: as in `edit`.
        grid: the candidates, from `make_grid`.
        scorer: from `make_scorer`, or any object with the methods of `FolderScorer` or `ModelScorer`.
        listener: is told of every model that is scored; a subclass of `Listener`.
        progress: is told of the edit that writes `out`; a subclass of `Progress`.
        overwrite, fresh, card: as in `edit`; `fresh` drops the scores as well.
        write_best: write the best candidate also where it is no better than FT beyond noise, by the 95 % interval
            that allows for the choice (max-T bootstrap over the examples, `bootstrap.py`).
        retry_failed: score again what an earlier run recorded as failed.
        at_once: the most models that are scored at once, with engine `ray`.

    Raises:
        ScoreError: FT has no score, or no candidate has one.
        PomeError: whatever `edit` raises.
    """
    with open_pair(base, ft, share_spec(grid), whole=True, whole_base=True) as opened:
        plans = make_plans(opened, grid)
        # Only for the same command: the staging folder's command proves that OUT was made from these inputs.
        written = None if overwrite or fresh else _find_written(Path(os.fspath(out)), grid, scorer)
        target = check_target(Path(os.fspath(out)), opened.list_inputs(), overwrite or written is not None)
        command = {**describe_command(opened, grid.shared), **scorer.describe()}
        if written is None and hasattr(scorer, "prepare"):
            scorer.prepare()
        for note in check_base(opened.base, opened.ft, opened.plan, grid.shared):
            (progress or Progress()).note(note)
        with Staging(target, command, fresh, SWEEP_SUFFIX) as staging:
            journal = Journal(staging.folder / "scores.jsonl", command, retry_failed)
            try:
                with _find_workers(opened, grid, scorer, staging, at_once) as remote:
                    run = _SweepRun(opened, plans, grid, scorer, staging, journal, listener or Listener(), remote)
                    outcome = run.score_all()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {len(journal.entries)} scores are safe in {staging.folder}; run the same command "
                    "again to go on"
                ) from None
            run.models.forget()
            if written is not None:
                outcome = dataclasses.replace(outcome, manifest=written)
                staging.discard()
            elif outcome.best is not None and (outcome.beats or write_best):
                from pome.sweeping.cache import DecompositionFolder

                best = cast(Candidate, outcome.best.candidate)
                cache = DecompositionFolder(staging.folder / "decompositions")
                manifest = edit_pair(
                    base, ft, out, best.spec, progress, overwrite=overwrite, fresh=fresh, card=card,
                    find_cache=cache.find_cache, sweep=outcome.describe(),
                )  # fmt: skip
                outcome = dataclasses.replace(outcome, manifest=manifest)
                staging.discard()
            else:
                shutil.rmtree(staging.folder / "decompositions", ignore_errors=True)
                staging.clear_output()
    return dataclasses.replace(outcome, peak_bytes=measure_peak())


def _find_written(out: Path, grid: Grid, scorer: FolderScorer | ModelScorer) -> Manifest | None:
    """The manifest of OUT, where a run of this sweep was stopped after it wrote OUT and before it cleared up."""
    folder = Path(os.path.expanduser(out))
    if not folder.with_name(folder.name + SWEEP_SUFFIX).is_dir():
        return None
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except VerificationError:
        return None
    record = manifest.sweep or {}
    same = (record.get("grid"), record.get("scorer")) == (grid.to_mapping(), scorer.describe())
    return manifest if same else None


def share_spec(grid: Grid) -> EditSpec:
    return dataclasses.replace(grid.shared, layers=grid.layers[0])


@contextlib.contextmanager
def _find_workers(
    opened: Opened, grid: Grid, scorer: FolderScorer | ModelScorer, staging: Staging, at_once: int | None
) -> Iterator[RemoteScores | None]:
    """The workers of a sweep on Ray, at most `at_once` of them; None where it runs here."""
    if grid.shared.engine != "ray":
        yield None
        return
    from pome.sweeping.remote import RemoteScores

    with RemoteScores(opened, grid, scorer, staging.folder, at_once) as remote:
        yield remote


def make_plans(opened: Opened, grid: Grid) -> dict[tuple[str, ...], Plan]:
    """One plan for each alternative of layers; a sweep varies nothing else that a plan depends on."""
    plans = {}
    for layers in grid.layers:
        spec = dataclasses.replace(grid.shared, layers=layers)
        plans[layers] = plan_pair(opened.base, opened.ft, spec)
    return plans


@dataclasses.dataclass
class _SweepRun:
    """The state of one sweep: the trials so far, and the copy in which candidates are made."""

    opened: Opened
    plans: dict[tuple[str, ...], Plan]
    grid: Grid
    scorer: FolderScorer | ModelScorer
    staging: Staging
    journal: Journal
    listener: Listener
    remote: RemoteScores | None = None

    def __post_init__(self) -> None:
        self.trials: dict[str, Trial] = {}
        self.count = self.grid.size + 2
        device, cache = (
            self.grid.shared.device if self.remote is None else "cpu",
            self.staging.folder / "decompositions",
        )
        self.models = Models(self.opened, self.plans, self.scorer, self.staging, device, cache)

    def score_all(self) -> Outcome:
        from pome.sweeping.cache import count_bytes
        from pome.sweeping.ranking import rank_trials

        # A copy that an earlier run left holds one of its candidates, perhaps of other layers: it is made anew.
        self.staging.clear_output()
        self._check_space(count_bytes(list(self.plans.values()), self.grid.methods))
        reference, *_ = self._try_all([(FINE_TUNED, None), (BASE, None)][: 1 if self.remote is None else 2])
        if reference.score is None:
            raise ScoreError(f"the fine-tuned model has no score: {reference.failed}; mend the scorer and run again")
        self._try(BASE, None)
        search = walk(self.grid)
        sign = -1.0 if self.scorer.minimize else 1.0
        try:
            stage = next(search)
            while True:
                trials = self._try_all([(candidate.key, candidate) for candidate in stage])
                stage = search.send([None if t.score is None else sign * t.score.deciding.value for t in trials])
        except StopIteration:
            pass
        self.opened.check_unchanged()
        self.listener.finish()
        ranked, beats = rank_trials(list(self.trials.values()), reference.score, self.scorer.minimize)
        return Outcome(
            trials=ranked,
            best=ranked[0],
            beats=beats,
            minimize=self.scorer.minimize,
            scorer=self.scorer.describe(),
            grid=self.grid.to_mapping(),
            manifest=None,
            peak_bytes=0,
        )

    def _check_space(self, decomposition_bytes: int) -> None:
        copies = [count_space(self.opened.template, self.staging)] if self.models.needs_copy() else []
        copies_base = not self.models.in_memory or self.opened.base.adapter_beside
        if copies_base and self.journal.find(BASE) is None:
            copies.append(count_space(self.models.make_base_template(), self.staging))
        workers = 1 if self.remote is None else self.remote.workers  # each has a copy of its own
        copy_bytes = sum(size for size, _ in copies) * workers
        self.listener.begin(self.opened, self.count, decomposition_bytes, copy_bytes, self.staging.folder)
        self.staging.check_space(decomposition_bytes, None)
        for _, shared in copies:
            self.staging.check_space(decomposition_bytes + copy_bytes, shared)

    def _try(self, key: str, candidate: Candidate | None) -> Trial:
        """A model's trial: from this run, from the journal, or made and scored now."""
        if key in self.trials:
            return self.trials[key]
        known = self.journal.find(key)
        if known is None:
            self.listener.start(_label(key, candidate), len(self.trials) + 1, self.count)
            return self._keep(key, candidate, self.models.attempt(key, candidate))
        return self._keep(key, candidate, Attempt(known.score, known.failed, known.seconds), earlier=True)

    def _try_all(self, wanted: Sequence[tuple[str, Candidate | None]]) -> list[Trial]:
        """The trials of models that do not depend on one another; on Ray those that are not known at the same time."""
        if self.remote is not None:
            new = {key: each for key, each in wanted if key not in self.trials and self.journal.find(key) is None}
            for key in new:
                self.listener.start(_label(key, new[key]), len(self.trials) + 1, self.count)
            for key, attempt in self.remote.map(list(new.items())):
                self._keep(key, new[key], attempt)
        return [self._try(key, candidate) for key, candidate in wanted]

    def _keep(self, key: str, candidate: Candidate | None, attempt: Attempt, earlier: bool = False) -> Trial:
        label = _label(key, candidate)
        trial = Trial(key, label, candidate, attempt.score, attempt.failed, attempt.seconds, earlier=earlier)
        if not earlier and (attempt.failed is None or key != FINE_TUNED):  # without FT's score there is no sweep
            self.journal.add(trial)
        self.trials[key] = trial
        self.listener.tell(trial, len(self.trials), self.count)
        return trial


def _label(key: str, candidate: Candidate | None) -> str:
    return candidate.label if candidate else key
