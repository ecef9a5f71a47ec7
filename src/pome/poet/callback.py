"""POET merges in the Trainer of transformers. The only module of `pome.poet` that needs transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pome.errors import SpecError
from pome.poet.merger import Merger


class PoetCallback(TrainerCallback, ExportableState):
    """`Merger` for the Trainer: counts optimiser steps, merges when due, is saved and loaded with checkpoints.

    Wrap the model before it goes to the Trainer. Options as in `Merger`. A resumed run continues in the middle of an
    interval. At the end of training the rotations are folded into the weights, so what the Trainer saves last is
    whole without its `poet_...` tensors; `unwrap` removes them. Give the rotations their own rate by
    `Trainer(optimizers=(AdamW(parameter_groups(...)), None))`.
    """

    def __init__(self, every: int = 200, resample_every: int = 1, max_norm: float | None = None, ramp: int = 0) -> None:
        self._options: dict[str, Any] = {
            "every": every,
            "resample_every": resample_every,
            "max_norm": max_norm,
            "ramp": ramp,
        }
        self.merger: Merger | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the merger, and gives it the counters of the checkpoint in a resumed run."""
        model: nn.Module = kwargs["model"]
        self.merger = Merger(model, kwargs["optimizer"], **self._options)
        if state.global_step == 0:
            return
        # The Trainer gives callbacks their state back only where its arguments ask for it; so it is read here.
        stored: Any = state.stateful_callbacks
        saved = stored.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        if not saved or "merger" not in saved.get("attributes", {}):
            raise SpecError("the checkpoint to resume from holds no state of PoetCallback; start anew")
        self.merger.load_state_dict(saved["attributes"]["merger"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the step and merges when due."""
        assert self.merger is not None
        self.merger.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Folds what the rotations hold into the weights."""
        assert self.merger is not None
        self.merger.merge()

    def state(self) -> dict[str, Any]:
        """Options and counters, as the Trainer writes them to `trainer_state.json`."""
        attributes = {} if self.merger is None else {"merger": self.merger.state_dict()}
        return {"args": self._options, "attributes": attributes}
