"""Embeddings and heads in an adapter: whole tensors, trained rows, and LoRAs of a tied or resized table.

A full output has BASE's tensors, so it cannot hold all of it: a table of another size, or a table that the adapter
changes on one side where BASE stores one tensor for both. An adapter as the output holds it as it is. No torch.
"""

from __future__ import annotations

from functools import cached_property

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.lora import AdapterChange, LoraTensors, LowRank, MatchedAdapter, check_rank, refuse_shape
from pome.checkpoint.lora_config import MERGE_FIRST, LoraConfig
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.model_config import config_of, config_of_text, size_of
from pome.roles.roles import find_layout

AS_ADAPTER = "write an adapter (--out-format adapter)"
TABLES = {"embed", "head"}
# Modules that transformers puts on a model for a task, and that a base trained for language does not have.
_TASK_HEADS = frozenset({"score", "classifier", "qa_outputs", "classification_head", "pre_classifier"})


class TableMatcher:
    """The pairing of whole tensors and of tables with one base; with `merges` BASE's tensors are to hold them."""

    def __init__(
        self, ft: Checkpoint, base: Checkpoint, config: LoraConfig, names: dict[str, str], merges: bool
    ) -> None:
        self.ft, self.base, self.config, self.names, self.merges = ft, base, config, names, merges
        self.shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}

    def match_replacement(self, plain: str, entry: TensorEntry, found: MatchedAdapter) -> None:
        """Pair a tensor that the adapter holds whole: it replaces BASE's, or is added where BASE has none."""
        module = plain.rpartition(".")[0]
        name = self.names.get(plain)
        if name is None:
            self._match_absent(plain, module, entry, found)
        elif self.shapes[name] != entry.shape:
            table = self.names.get(f"{module}.weight", name)  # of a bias, the table beside it
            resized = self._roles(table) <= TABLES and entry.shape[1:] == self.shapes[name][1:]
            if resized and not self.merges:
                found.unmatched.append(entry.name)
                return
            way_out = f"another vocabulary, which BASE's tensor cannot hold: {AS_ADAPTER}; " if resized else ""
            raise PairingError(
                f"{self.ft.where(entry.name)}: its shape {list(entry.shape)} is not {list(self.shapes[name])} of "
                f"BASE's {printable(name)}; {way_out}is {printable(self.base.source)} the model it was trained on? "
                f"give that, {MERGE_FIRST}"
            )
        elif self._is_untied(name, module):
            self._keep_apart(entry, "replaces the embedding and leaves the head", found)
        else:
            found.put(self.ft, AdapterChange(name, whole=entry.name))

    def match_tokens(self, module: str, entry: TensorEntry, found: MatchedAdapter) -> None:
        """Pair the trained rows of an embedding or a head."""
        name = self.names.get(f"{module}.weight")
        rows = self.config.list_tokens(module)
        if rows is None or len(entry.shape) != 2 or len(rows) != entry.shape[0] or len(set(rows)) != len(rows):
            raise CheckpointError(
                f"{self.ft.where(entry.name)}: shape {list(entry.shape)}, whose rows trainable_token_indices of "
                "adapter_config.json does not number; take both files from one save of the adapter"
            )
        if name is None and self._is_tied_head(module, None):
            self._keep_apart(entry, "changes rows of the head and leaves the embedding", found)
        elif name is None:
            found.unused.append(entry.name)
        elif entry.shape[1:] != self.shapes[name][1:]:
            raise PairingError(
                f"{self.ft.where(entry.name)}: its rows have {entry.shape[-1]} entries, those of BASE's "
                f"{printable(name)} {self.shapes[name][-1]}; is {printable(self.base.source)} the model it was trained "
                "on? give that"
            )
        elif max(rows) < self.shapes[name][0]:
            found.put(self.ft, AdapterChange(name, tokens=(entry.name, tuple(rows))))
        elif self.merges:
            raise PairingError(
                f"{self.ft.where(entry.name)}: row {max(rows)} is trained, and BASE's {printable(name)} has "
                f"{self.shapes[name][0]} rows; {AS_ADAPTER}, {MERGE_FIRST}"
            )
        else:
            found.unmatched.append(entry.name)

    def match_lora(self, lora: LoraTensors, found: MatchedAdapter) -> bool:
        """Whether a LoRA is that of a tied head or of a resized table, and so is dealt with here."""
        a, b = lora.pair
        table = (a.shape[1], b.shape[0]) if lora.is_embedding else (b.shape[0], a.shape[1])
        name = self.names.get(f"{lora.module}.weight")
        resized = (
            name is not None
            and self._roles(name) <= TABLES
            and self.shapes[name] != table
            and self.shapes[name][1:] == table[1:]
        )
        if name is not None and not resized or name is None and not self._is_tied_head(lora.module, table):
            return False
        if name is None and not self.config.get("ensure_weight_tying"):
            self._keep_apart(a, "changes the head and leaves the embedding", found)
        elif name is not None and self.merges:
            refuse_shape(self.ft, self.base, lora, name, self.shapes[name], f"another vocabulary: {AS_ADAPTER}; ")
        # With ensure_weight_tying the LoRA of the head is that of the embedding, which BASE's one tensor gets already.
        rank, scaling = check_rank(self.ft, self.config, lora, lora.module, 1)
        found.others[a.name] = LowRank(lora.module, a.name, b.name, rank, scaling, "linear", False)
        found.unmatched += [entry.name for entry in lora.tensors.values() if entry.name not in found.unmatched]
        return True

    def _match_absent(self, plain: str, module: str, entry: TensorEntry, found: MatchedAdapter) -> None:
        """A whole tensor under a name that BASE lacks: a head of the adapter's own, such as a classifier's."""
        if self._is_tied_head(module, entry.shape):
            if self.config.get("ensure_weight_tying"):
                found.unmatched.append(entry.name)  # the embedding's values once more
            else:
                self._keep_apart(entry, "replaces the head and leaves the embedding", found)
            return
        if not self.config.saves(module) or not all(entry.shape):
            found.unused.append(entry.name)
        elif not self.merges:
            found.unmatched.append(entry.name)
        elif _TASK_HEADS.isdisjoint(module.split(".")) or any(word.isdigit() for word in module.split(".")):
            raise PairingError(
                f"{self.ft.where(entry.name)}: the adapter holds the module {printable(module)}, which BASE lacks or "
                f"has under another name; {AS_ADAPTER}, {MERGE_FIRST}"
            )
        else:
            found.put(self.ft, AdapterChange(plain, whole=entry.name, added=True))
            task = self.config.get("task_type")
            kind = f", a model of the adapter's task type {printable(str(task))}" if task else ""
            found.notes.append(
                f"{printable(plain)} {list(entry.shape)} is added from the adapter; config.json is BASE's, so load "
                f"OUT as the kind of model that has it{kind}"
            )

    def _keep_apart(self, entry: TensorEntry, what: str, found: MatchedAdapter) -> None:
        """Keep a tensor for an adapter as the output. Raises PairingError where BASE's tensors are to hold it."""
        if self.merges:
            raise PairingError(
                f"{self.ft.where(entry.name)}: the adapter {what}, but BASE stores one tensor for both; {AS_ADAPTER}, "
                f"{MERGE_FIRST}"
            )
        found.unmatched.append(entry.name)

    def _is_untied(self, name: str, module: str) -> bool:
        """Whether a module to save replaces an embedding that the head shares: PEFT leaves the head as it is.

        A LoRA of such an embedding stays shared.
        """
        if not self.config.saves(module) or self.config.get("ensure_weight_tying"):
            return False
        if size_of(config_of(name, self.base.config), "vocab_size") not in (None, self.shapes[name][0]):
            return False  # a table of positions or of token types
        return self._roles(name) == {"embed"} and self.is_tied

    def _is_tied_head(self, module: str, shape: tuple[int, ...] | None) -> bool:
        """Whether a module that BASE lacks is the head that shares the embedding's tensor; None: of any shape."""
        tables = {one for name, one in self.shapes.items() if self._roles(name) == {"embed"}}
        size = shape or next(iter(tables), (0, 0))
        roles = {part.role for part in find_layout(f"{module}.weight", size, self.base.config).parts}
        return roles == {"head"} and self.is_tied and size in tables

    def _roles(self, name: str) -> set[str]:
        return {part.role for part in find_layout(name, self.shapes[name], self.base.config).parts}

    @cached_property
    def is_tied(self) -> bool:
        """Whether BASE stores one tensor for its embedding and its head."""
        config = self.base.config
        text = config_of_text(config) if config else None
        tied = {side.get("tie_word_embeddings") for side in (config, text) if side} - {None} != {False}
        return tied and not any(self._roles(name) == {"head"} for name in self.shapes)
