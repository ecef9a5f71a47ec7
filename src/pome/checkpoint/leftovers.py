"""Files of a checkpoint that no output holds, known by their names: training state, and weights in another format.

A file is left out only where it is known to be one of these. Any other is copied: a model may need it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TRAINING = "training state"
OTHER_FORMAT = "weights in another format, which this edit does not change"

# Folders in which trainers save: transformers, accelerate, Lightning, Ray, torchtune, DeepSpeed, FSDP, Megatron.
_TRAINING_FOLDER = re.compile(
    r"((last|best|tmp|final|intermediate)[-_])?checkpoint[-_]?\d+([-_].*)?|tmp-checkpoint.*"
    r"|(last|latest|best|final|intermediate)[-_]checkpoint|checkpoint[-_](last|latest|best|final)"
    r"|global_?step[-_]?\d*|epoch[-_=]?\d+([-_].*)?|step[-_=]?\d+|iter[-_]?\d+"
    r"|(pytorch_model|optimizer)(_fsdp)?_\d+|recipe_state"
)
_TRAINING_FILE = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|rng_states?|scaler|grad_scaler|sampler|dl_state_dict|recipe_state"
    r"|zero_pp_rank|bf16_zero_pp_rank|mp_rank)([-_.\d].*)?\.(pt|pth|bin)"
    r"|(random_states?|custom_checkpoint)([-_.\d].*)?\.(pkl|pt|pth|bin)|optim(izer)?([-_.\d].*)?\.safetensors"
    r"|.*_optim_states\.pt|.*\.distcp|(epoch=\d+.*|last(-v\d+)?)\.ckpt|training_args\.bin|trainer_state\.json"
)
# Older saves of a whole model under names that a library gives: copied, they would bring the unedited weights along.
_OTHER_NAMES = re.compile(
    r"((pytorch_|tf_|flax_|rust_|openvino_)?model|pytorch_model_fsdp|consolidated|diffusion_pytorch_model)([-_.].*)?"
    r"\.(bin|pt|pth|ckpt|h5|msgpack|ot|onnx|onnx_data|tflite|mlmodel)(\.index\.json|_data|\.data-.*|\.index|\.meta)?"
    r"|consolidated([-_.].*)?\.safetensors(\.index\.json)?"
    r"|(?!mmproj).*\.(gguf|ggml)|ggml-.*\.bin|.*_model(_.*)?\.onnx(_data)?"
)
_ONNX = (".onnx", ".onnx_data")
# Folders in which a repository keeps the model once more, in its authors' own format.
_OTHER_FOLDERS = ("original", "metal", "onnx", "openvino", "coreml", "gguf")
_WEIGHTS = (*PICKLED, ".safetensors", ".safetensors.index.json", ".h5", ".msgpack", ".gguf", *_ONNX)


def is_adapter_file(name: str) -> bool:
    """Whether a file at the top of a folder holds the weights of a PEFT adapter."""
    return name.startswith("adapter_model") and name.endswith((".safetensors", ".bin"))


def is_training_folder(name: str) -> bool:
    """Whether a folder of this name is one in which a trainer saves its state."""
    return _TRAINING_FOLDER.fullmatch(name) is not None


def find_leftover(name: str, beside: Collection[str]) -> str | None:
    """Why a file is left out by its name alone, or None.

    `name` is its path below the checkpoint, `beside` are the names of the files in its folder.
    """
    *folders, file = name.split("/")
    if any(map(is_training_folder, folders)) or _TRAINING_FILE.fullmatch(file):
        return TRAINING
    if any(other.endswith(".distcp") for other in beside):
        return TRAINING  # all of a folder in which torch.distributed saved: `.metadata` too
    return OTHER_FORMAT if repeats_by_name(name, beside) else None


def repeats_by_name(name: str, beside: Collection[str]) -> bool:
    """Whether a file is known by its name to hold the model's weights once more, in another format.

    Pickled weights that stand alone with a config in a folder below the checkpoint are another part of the model, such
    as 2_Dense of sentence-transformers; so are weights of which no name is known, such as a speaker table.
    """
    *folders, file = name.split("/")
    if any(folder in _OTHER_FOLDERS for folder in folders):
        return file.endswith(_WEIGHTS)
    stem = file.rpartition(".")[0]
    twin = file.endswith(PICKLED) and f"{stem}.safetensors" in beside
    if not twin and not _OTHER_NAMES.fullmatch(file):
        return False
    alone = bool(folders) and not any(other.endswith(".safetensors") for other in beside)
    configured = any(other.endswith("config.json") for other in beside)
    pickled = file.endswith((*PICKLED, ".bin.index.json"))
    return not (alone and configured and pickled)
