"""Choice of the weight files of a checkpoint folder, as transformers makes it, and the files that are left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pome.checkpoint.files import Listing, read_header
from pome.checkpoint.header import parse_index
from pome.checkpoint.leftovers import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OTHER_FORMAT,
    PICKLED,
    is_adapter_file,
    repeats_by_name,
)
from pome.checkpoint.weights import Tensors
from pome.errors import CheckpointError, printable

INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.safetensors")
# Names under which a library saves a whole model. A file of such a name is never just a part beside the weights.
_MAIN = re.compile(r"(pytorch_)?model([-_.].*)?\.safetensors")
NO_WEIGHTS = "holds no .safetensors file"
CONVERT = (
    "pickled weights are never unpickled; convert them once with transformers: "
    "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True), "
    "or torch.load(FILE, weights_only=True) and safetensors.torch.save_file"
)
MLX_WEIGHTS = "adapters.safetensors"
FUSE_MLX = "fuse it into its model with mlx_lm.fuse (--dequantize for a quantized one) and give the fused model as FT"
ADAPTER_BESIDE = "a PEFT adapter beside whole weights, which loaders would apply to the edited weights again"
RIVAL = "repeats the checkpoint's weights; {taken} is taken, as transformers does"


@dataclass(frozen=True)
class Choice:
    """The weight files of a folder, and the index that names them (None without one)."""

    names: list[str]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None

    @property
    def shown(self) -> str:
        return show_names(self.names)


def is_adapter(names: Collection[str]) -> bool:
    """Whether a folder with these names at its top holds a PEFT adapter and no whole model."""
    if ADAPTER_CONFIG not in names:
        return False
    others = [name for name in names if name.endswith(".safetensors") and not is_adapter_file(name)]
    if not others:
        return True
    # Parts that were trained beside the adapter, such as a value head, are no whole model.
    whole = any(_MAIN.fullmatch(name) or SHARD.fullmatch(name) or name.endswith(INDEX_SUFFIX) for name in names)
    return ADAPTER_WEIGHTS in names and "config.json" not in names and not whole


def choose_weights(listing: Listing) -> Choice:
    """The weight files of a folder. Raises CheckpointError where no single reading is left, or a file is missing.

    The order is that of transformers: `model.safetensors`, then the index, then whatever single reading is left.
    """
    names, label = listing.names, listing.label
    found = [name for name in names if name.endswith(".safetensors") and not is_adapter_file(name)]
    plain = [name for name in found if not repeats_by_name(name, names)] or found
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if ADAPTER_CONFIG in names and MLX_WEIGHTS in names and "config.json" not in names:
        raise CheckpointError(f"{label}/{MLX_WEIGHTS}: an adapter of MLX, not of PEFT; {FUSE_MLX}")
    if ADAPTER_CONFIG in names and "config.json" not in names:
        raise CheckpointError(
            f"{label}: holds the config of a PEFT adapter beside weights that are not an adapter's; keep one of the two"
        )
    if "model.safetensors" in found:
        return Choice(["model.safetensors"])
    if not indexes:
        return Choice(_choose_without_index(listing, plain))
    index = "model" + INDEX_SUFFIX if "model" + INDEX_SUFFIX in indexes else indexes[0]
    if index != "model" + INDEX_SUFFIX and len(indexes) > 1:
        raise CheckpointError(f"{label}: holds several indexes ({', '.join(map(printable, indexes))}); keep one")
    weight_map = parse_index(listing.read(index), f"{label}/{index}")
    chosen = sorted(set(weight_map.values()))
    absent = [name for name in chosen if not listing.holds(name)]
    if absent:
        raise CheckpointError(
            f"{label}/{printable(absent[0])}: missing, but {index} names it ({len(absent)} of {len(chosen)} files are "
            "missing); copy or download the checkpoint again"
        )
    return Choice(chosen, index, weight_map)


def _choose_without_index(listing: Listing, found: list[str]) -> list[str]:
    label, names = listing.label, listing.names
    if len(found) == 1 and not SHARD.fullmatch(found[0]):
        return found
    parts = [match for match in map(SHARD.fullmatch, found) if match]
    if parts and len({(part["stem"], part["total"]) for part in parts}) == 1:
        total = int(parts[0]["total"])
        if sorted(int(part["number"]) for part in parts) == list(range(1, total + 1)):
            return [part[0] for part in parts]
        raise CheckpointError(
            f"{label}: {len(parts)} of {total} shards are here and there is no index; copy the checkpoint again"
        )
    if found:
        raise CheckpointError(
            f"{label}: holds {len(found)} .safetensors files ({', '.join(map(printable, found[:3]))}, ...) and no "
            "model.safetensors.index.json that says which belong together; give one file by its path"
        )
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise CheckpointError(f"{label}/{printable(pickled[0])}: {CONVERT}")
    below = listing.find_weights_below()
    if below:
        shown = ", ".join(printable(f"{label}/{folder}") for folder in below[:5])
        raise CheckpointError(f"{label}: {NO_WEIGHTS}, but folders in it do; give one of them: {shown}")
    raise CheckpointError(f"{label}: {NO_WEIGHTS}; is this the folder of a saved model?")


def judge_rest(
    listing: Listing, choice: Choice, tensors: Tensors, config: Mapping[str, Any] | None
) -> tuple[dict[str, str], list[str]]:
    """Other weight files of a folder: those to leave out, by name, each with its reason; and notices.

    Files that hold other tensors than the chosen ones, such as a value head, belong to the model and are not left
    out. Raises CheckpointError where a second set of weights holds tensors that the chosen files lack.
    """
    unused: dict[str, str] = {}
    notices: list[str] = []
    reason = RIVAL.format(taken=choice.shown)
    names = listing.names
    rivals = [name for name in names if name.endswith(INDEX_SUFFIX) and name != choice.index]
    for name in names:
        if not name.endswith(".safetensors") or name in choice.names or is_adapter_file(name):
            continue
        if repeats_by_name(name, names):
            unused[name] = OTHER_FORMAT
            continue
        try:
            file = listing.open(name)
            try:
                held = read_header(file).tensors.keys()
            finally:
                file.close()
        except CheckpointError as error:
            unused[name] = "cannot be read as safetensors"
            notices.append(f"{error}; it is left out")
            continue
        lacking = [tensor for tensor in held if tensor not in tensors and not _is_derived(tensor, config)]
        shared = len(held - set(lacking))
        if lacking and (_MAIN.fullmatch(name) or SHARD.fullmatch(name)):
            raise CheckpointError(
                f"{listing.label}/{printable(name)}: holds {len(lacking)} tensors, such as {printable(lacking[0])}, "
                f"that {choice.shown} lacks, which transformers would load; move the set of weights that is stale "
                "out of the folder"
            )
        if lacking and shared:
            notices.append(
                f"{listing.label}/{printable(name)}: repeats {shared} tensors of {choice.shown}; it is copied as it "
                "is, not edited"
            )
        elif not lacking:
            rivals.append(name)
    unused |= dict.fromkeys(rivals, reason)
    if rivals:
        notices.append(
            f"{listing.label}: takes {choice.shown}, as transformers does, and leaves {show_names(rivals)} aside"
        )
    adapter = [name for name in names if name == ADAPTER_CONFIG or is_adapter_file(name)]
    if ADAPTER_CONFIG in names:
        unused |= dict.fromkeys(adapter, ADAPTER_BESIDE)
        notices.append(
            f"{listing.label}: {show_names(adapter)} is {ADAPTER_BESIDE}; it is neither applied nor copied. If the "
            "weights do not hold it yet, move it to a folder of its own and give that as FT"
        )
    newer = listing.find_newer([n for n in names if n.endswith(PICKLED) and repeats_by_name(n, names)], choice.names)
    if newer:
        notices.append(
            f"{listing.label}: {show_names(newer)} is newer than {choice.shown}, which is taken, as transformers does; "
            "if it holds a later training, convert it first"
        )
    return unused, notices


def _is_derived(tensor: str, config: Mapping[str, Any] | None) -> bool:
    """Whether a model has a tensor without its being stored: a computed buffer, or a head tied to the embeddings."""
    tied = tensor in ("lm_head.weight", "embed_out.weight", "output.weight")
    return tensor.endswith("rotary_emb.inv_freq") or (tied and bool((config or {}).get("tie_word_embeddings")))


def find_misplaced(tensors: Tensors, weight_map: Mapping[str, str]) -> dict[str, str]:
    """Tensors that an index places elsewhere than the files do, each with what it says."""
    found = {}
    for name, file in weight_map.items():
        if name not in tensors:
            found[name] = f"it names {printable(name)} in {printable(file)}, which does not hold it"
        elif tensors[name][0] != file:
            found[name] = f"it names {printable(name)} in {printable(file)}, and it is in {tensors[name][0]}"
    for name in tensors.keys() - weight_map.keys():
        found[name] = f"it does not name {printable(name)}, which stands in {tensors[name][0]}"
    return found


def describe_misplaced(where: str, misplaced: Mapping[str, str]) -> str:
    """A notice of wrong entries of an index, for tensors that nobody selected."""
    first = "; ".join(list(misplaced.values())[:3])
    more = f"; and {len(misplaced) - 3} more" if len(misplaced) > 3 else ""
    return f"{where}: does not agree with the files: {first}{more}. The files are followed, as transformers does"


def show_names(names: Collection[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(printable(name) for name in list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
