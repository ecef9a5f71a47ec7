"""The models of a sweep: made one after the other out of one copy, on disk or in memory, and scored there."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pome.checkpoint.sidefiles import list_side_files
from pome.editing.session import Opened
from pome.errors import NumericalError, ScoreError, printable
from pome.output.copying import Template, copy_files, count_space, make_config
from pome.output.progress import Progress
from pome.output.staging import Staging
from pome.output.target import SCORER_LOG
from pome.planning.units import Plan
from pome.sweeping.fingerprints import Fingerprints, remove_changed, take_fingerprints
from pome.sweeping.grid import BASE, Candidate
from pome.sweeping.scorers.base import FolderScorer, ModelScorer, Score
from pome.sweeping.scorers.language import load_model

if TYPE_CHECKING:
    from pome.sweeping.candidates import Maker


@dataclass(frozen=True)
class Attempt:
    """A model's score, or why it has none, and the seconds that it took."""

    score: Score | None
    failed: str | None
    seconds: float


class Models:
    """Maker and scorer of a sweep's models. `decompositions` is the folder that keeps those of its matrices.

    The copy that candidates are made in is the output of `staging`.
    """

    def __init__(
        self,
        opened: Opened,
        plans: dict[tuple[str, ...], Plan],
        scorer: FolderScorer | ModelScorer,
        staging: Staging,
        device: str,
        decompositions: Path,
    ) -> None:
        from pome.editing.unit import list_devices

        self.opened = opened
        self.plans = plans
        self.scorer = scorer
        self.staging = staging
        self.devices = list_devices(device)
        self.decompositions = decompositions
        self._maker: Maker | None = None
        self._fingerprints: Fingerprints = {}  # of the copy, taken before a command gets it
        self._model: tuple[Any, Any] | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the scorer takes a loaded model, not a folder."""
        return hasattr(self.scorer, "score_model")

    def make_base_template(self) -> Template:
        """The files of BASE, as it is scored."""
        base = self.opened.base
        return Template(base, {}, list_side_files(base)[0], make_config(base, ""))

    def needs_copy(self) -> bool:
        """Whether candidates are made on the disk; a model in memory needs FT as it is, in a folder."""
        ft = self.opened.ft
        # Loaders apply an adapter that lies beside whole weights; in the copy it is not there.
        whole = ft.adapter_config is None and not ft.dequantized and not ft.adapter_beside
        return not (self.in_memory and whole)

    def attempt(self, key: str, candidate: Candidate | None) -> Attempt:
        """Make a model and score it, or say why that cannot be."""
        begun = time.perf_counter()
        score, failed = None, None
        try:
            score = self.score(key, candidate)
        except (ScoreError, NumericalError) as error:
            failed = str(error)
        return Attempt(score, failed, time.perf_counter() - begun)

    def score(self, key: str, candidate: Candidate | None) -> Score:
        """Make a model and score it. Raises ScoreError and NumericalError."""
        if key == BASE:
            return self._score_base()
        if self.in_memory and self._load():
            assert self._model is not None
            self._make(candidate)
            return self._score_model(*self._model)
        self._make(candidate)
        if self.in_memory:
            return self._score_model(*load_model(self.staging.output, self.devices[0]))
        self._fingerprints = take_fingerprints(self.staging.output)
        return cast(FolderScorer, self.scorer).score_folder(self.staging.output)

    def _score_base(self) -> Score:
        base, in_memory = self.opened.base, self.in_memory
        if in_memory:
            self.forget()  # one model at a time; what is loaded again costs seconds
        if in_memory and not base.adapter_beside:
            return self._score_model(*load_model(base.folder or Path(os.path.expanduser(base.source)), self.devices[0]))
        # A copy: without an adapter that loaders would apply, and for a command, which may write or remove files.
        template = self.make_base_template()
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
            # The output of libraries that score would disturb the screen; it goes to a file beside the scores.
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
            if not self.needs_copy() and self.opened.ft.folder is not None:
                self._model = load_model(self.opened.ft.folder, self.devices[0])
                targets = find_targets(self._model[0], self.opened, plans)
                if targets is not None:
                    caches = DecompositionFolder(self.decompositions)
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
            caches = DecompositionFolder(self.decompositions)

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

    def forget(self) -> None:
        """Give its memory back."""
        self._maker = self._model = None
