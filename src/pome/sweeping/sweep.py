"""Sweep over options of an edit: score the candidates of one pair, and write the best if it is better beyond noise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pome.checkpoint.sidefiles import MANIFEST_NAME, list_side_files
from pome.config.spec import EditSpec
from pome.editing.base_check import check_base
from pome.editing.edit import edit_pair
from pome.editing.session import Opened, Source, describe_command, open_pair, plan_pair
from pome.errors import NumericalError, ScoreError, VerificationError, printable
from pome.manifest import Manifest, read_manifest
from pome.output.copying import Template, copy_files, count_space, make_config
from pome.output.progress import Progress
from pome.output.staging import Staging
from pome.output.target import SCORER_LOG, SWEEP_SUFFIX, check_target
from pome.planning.units import Plan
from pome.sweeping.fingerprints import Fingerprints, remove_changed, take_fingerprints
from pome.sweeping.grid import BASE, FINE_TUNED, Candidate, Grid, walk
from pome.sweeping.journal import Journal
from pome.sweeping.scorers.base import FolderScorer, ModelScorer, Score
from pome.sweeping.scorers.language import load_model
from pome.sweeping.trials import Listener, Outcome, Trial, measure_peak

if TYPE_CHECKING:
    from pome.sweeping.candidates import Maker


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

    Raises:
        ScoreError: FT has no score, or no candidate has one.
        PomeError: whatever `edit` raises.
    """
    with open_pair(base, ft, _shared_spec(grid), whole=True, whole_base=True) as opened:
        plans = _make_plans(opened, grid)
        # Only for the command as it was: what it wrote is of these inputs, which the staging folder's command proves.
        written = None if overwrite or fresh else _find_written(Path(os.fspath(out)), grid, scorer)
        target = check_target(Path(os.fspath(out)), opened.list_inputs(), overwrite or written is not None)
        command = {**describe_command(opened, grid.shared), **scorer.describe()}
        if written is None and hasattr(scorer, "prepare"):
            scorer.prepare()
        for note in check_base(opened.base, opened.ft, opened.plan, grid.shared):
            (progress or Progress()).note(note)
        with Staging(target, command, fresh, SWEEP_SUFFIX) as staging:
            journal = Journal(staging.folder / "scores.jsonl", command, retry_failed)
            run = _SweepRun(opened, plans, grid, scorer, staging, journal, listener or Listener())
            try:
                outcome = run.score_all()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {len(journal.entries)} scores are safe in {staging.folder}; run the same command "
                    "again to go on"
                ) from None
            run.forget_model()
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


def _shared_spec(grid: Grid) -> EditSpec:
    return dataclasses.replace(grid.shared, layers=grid.layers[0])


def _make_plans(opened: Opened, grid: Grid) -> dict[tuple[str, ...], Plan]:
    """One plan for each alternative of layers; a sweep varies nothing else that a plan depends on."""
    plans = {}
    for layers in grid.layers:
        spec = dataclasses.replace(grid.shared, layers=layers)
        plans[layers] = plan_pair(opened.base, opened.ft, spec)
    return plans


def _make_base_template(opened: Opened) -> Template:
    """The files of BASE, as it is scored."""
    return Template(opened.base, {}, list_side_files(opened.base)[0], make_config(opened.base, ""))


class _SweepRun:
    """The state of one sweep: the trials so far, and the copy in which candidates are made."""

    def __init__(
        self,
        opened: Opened,
        plans: dict[tuple[str, ...], Plan],
        grid: Grid,
        scorer: FolderScorer | ModelScorer,
        staging: Staging,
        journal: Journal,
        listener: Listener,
    ) -> None:
        from pome.editing.unit import list_devices

        self.opened = opened
        self.plans = plans
        self.grid = grid
        self.scorer = scorer
        self.staging = staging
        self.listener = listener
        self.devices = list_devices(grid.shared.device)
        self.journal = journal
        self.trials: dict[str, Trial] = {}
        self.count = grid.size + 2
        self._maker: Maker | None = None
        self._fingerprints: Fingerprints = {}  # of the copy as it was given to a command
        self._model: tuple[Any, Any] | None = None

    def score_all(self) -> Outcome:
        from pome.sweeping.cache import count_bytes
        from pome.sweeping.ranking import rank_trials

        # A copy that an earlier run left holds one of its candidates, perhaps of other layers: it is made anew.
        self.staging.clear_output()
        self._check_space(count_bytes(list(self.plans.values()), self.grid.methods))
        reference = self._try(FINE_TUNED, None)
        if reference.score is None:
            raise ScoreError(f"the fine-tuned model has no score: {reference.failed}; mend the scorer and run again")
        self._try(BASE, None)
        search = walk(self.grid)
        sign = -1.0 if self.scorer.minimize else 1.0
        try:
            candidate = next(search)
            while True:
                trial = self._try(candidate.key, candidate)
                candidate = search.send(None if trial.score is None else sign * trial.score.deciding.value)
        except StopIteration:
            pass
        self.opened.check_unchanged()
        self.listener.finish()
        trials, beats = rank_trials(list(self.trials.values()), reference.score, self.scorer.minimize)
        return Outcome(
            trials=trials,
            best=trials[0],
            beats=beats,
            minimize=self.scorer.minimize,
            scorer=self.scorer.describe(),
            grid=self.grid.to_mapping(),
            manifest=None,
            peak_bytes=0,
        )

    def _check_space(self, decomposition_bytes: int) -> None:
        copies = [count_space(self.opened.template, self.staging)] if self._needs_copy() else []
        copies_base = not _in_memory(self.scorer) or self.opened.base.adapter_beside
        if copies_base and self.journal.find(BASE) is None:
            copies.append(count_space(_make_base_template(self.opened), self.staging))
        copy_bytes = sum(size for size, _ in copies)
        self.listener.begin(self.opened, self.count, decomposition_bytes, copy_bytes, self.staging.folder)
        self.staging.check_space(decomposition_bytes, None)
        for _, shared in copies:
            self.staging.check_space(decomposition_bytes + copy_bytes, shared)

    def _needs_copy(self) -> bool:
        """Whether candidates are made on the disk; a model in memory needs FT as it is, in a folder."""
        ft = self.opened.ft
        # Loaders apply an adapter that lies beside whole weights; in the copy it is not there.
        whole = ft.adapter_config is None and not ft.dequantized and not ft.adapter_beside
        return not (_in_memory(self.scorer) and whole)

    def _try(self, key: str, candidate: Candidate | None) -> Trial:
        """A model's trial: from this run, from the journal, or made and scored now."""
        if key in self.trials:
            return self.trials[key]
        label = candidate.label if candidate else key
        begun = time.perf_counter()
        known = self.journal.find(key)
        if known is not None:
            trial = Trial(key, label, candidate, known.score, known.failed, known.seconds, earlier=True)
        else:
            score, failed = None, None
            self.listener.start(label, len(self.trials) + 1, self.count)
            try:
                score = self._score(key, candidate)
            except (ScoreError, NumericalError) as error:
                failed = str(error)
            trial = Trial(key, label, candidate, score, failed, time.perf_counter() - begun)
            if failed is None or key != FINE_TUNED:  # without it there is no sweep: the next run tries again
                self.journal.add(trial)
        self.trials[key] = trial
        self.listener.tell(trial, len(self.trials), self.count)
        return trial

    def _score(self, key: str, candidate: Candidate | None) -> Score:
        """Make a model and score it. Raises ScoreError and NumericalError."""
        if key == BASE:
            return self._score_base()
        if _in_memory(self.scorer) and self._load():
            assert self._model is not None
            self._make(candidate)
            return self._score_model(*self._model)
        self._make(candidate)
        if _in_memory(self.scorer):
            return self._score_model(*load_model(self.staging.output, self.devices[0]))
        self._fingerprints = take_fingerprints(self.staging.output)
        return cast(FolderScorer, self.scorer).score_folder(self.staging.output)

    def _score_base(self) -> Score:
        base, in_memory = self.opened.base, _in_memory(self.scorer)
        if in_memory:
            self.forget_model()  # one model at a time; what is loaded again costs seconds
        if in_memory and not base.adapter_beside:
            return self._score_model(*load_model(base.folder or Path(os.path.expanduser(base.source)), self.devices[0]))
        # A copy: without an adapter that loaders would apply, and for a command, which may write or remove files.
        template = _make_base_template(self.opened)
        with Staging(self.staging.folder / "base", {}, fresh=True, suffix="") as copy:
            try:
                copy.check_space(*count_space(template, copy))
                copy_files(template, copy, Progress())
                if in_memory:
                    return self._score_model(*load_model(copy.output, self.devices[0]))
                return cast(FolderScorer, self.scorer).score_folder(copy.output)
            finally:
                copy.discard()

    def _tidy(self) -> None:
        """Undo what a command did to the copy, so that no candidate finds what was left beside another."""
        gone = remove_changed(self.staging.output, self._fingerprints)
        self._fingerprints = {}
        if gone & self.opened.template.weights.files.keys():
            self.staging.clear_output()
            self._maker = None
        elif gone:
            copy_files(self.opened.template, self.staging, Progress())

    def _score_model(self, model: Any, tokenizer: Any) -> Score:
        log = self.staging.folder / SCORER_LOG
        try:
            # What libraries print while they score would tear the screen; it is kept beside the scores.
            with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                return cast(ModelScorer, self.scorer).score_model(model, tokenizer)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            # From inside a model: an index beyond a vocabulary, memory that a device does not have.
            reason = str(error).strip().splitlines()[:1] or [""]
            raise ScoreError(f"{type(error).__name__}: {printable(reason[0])}") from None

    def _load(self) -> bool:
        """Load FT into memory once, if the candidates can be made there."""
        from pome.sweeping.cache import DecompositionFolder
        from pome.sweeping.candidates import Maker, find_targets, write_into

        if self._maker is None:
            plans = list(self.plans.values())
            if not self._needs_copy() and self.opened.ft.folder is not None:
                self._model = load_model(self.opened.ft.folder, self.devices[0])
                targets = find_targets(self._model[0], self.opened, plans)
                if targets is not None:
                    caches = DecompositionFolder(self.staging.folder / "decompositions")
                    self._maker = Maker(self.opened, plans, self.devices, caches, write_into(targets))
                    self._maker.dirty.clear()  # it was compared with FT just now
                    return True
                self._model = None
        return self._model is not None

    def _make(self, candidate: Candidate | None) -> None:
        from pome.sweeping.cache import DecompositionFolder
        from pome.sweeping.candidates import Maker

        if self._fingerprints:
            self._tidy()
        if self._maker is None:
            self.staging.check_space(*count_space(self.opened.template, self.staging))
            copy_files(self.opened.template, self.staging, Progress())
            caches = DecompositionFolder(self.staging.folder / "decompositions")

            def write(unit: Any, data: bytes | bytearray) -> None:
                for file, start in unit.places:
                    self.staging.write(file, bytearray(data), start)

            self._maker = Maker(self.opened, list(self.plans.values()), self.devices, caches, write)
            if self.opened.ft.adapter_config is None:
                self._maker.dirty.clear()  # the copy is FT's, just made; of an adapter it is BASE's
        if candidate is None:
            self._maker.restore()
        else:
            self._maker.make(self.plans[candidate.spec.layers], candidate.spec)

    def forget_model(self) -> None:
        """Give its memory back."""
        self._maker = self._model = None


def _in_memory(scorer: FolderScorer | ModelScorer) -> bool:
    return hasattr(scorer, "score_model")
