"""Hostile files around the headers: configs, paths, names, files that are no files or that change under the reader."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pome
from pome import CheckpointError, EditSpec, PomeError, edit
from pome.editing.session import open_pair
from support.checkpoints import INDEX, LLAMA, hash_tree, llama_pair, run_python, write_checkpoint

SHARD = "model-00001-of-00002.safetensors"
MODELS = ("llama", "gpt2", "mixtral", "bert", "t5", "gpt_neox", "falcon", "phi3", "dbrx", "gpt_oss", "jamba", "mamba")
# Names and shapes whose roles and splits are read from a config: fused projections, experts, orientations.
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (12, 4),
    "model.layers.0.mlp.gate_up_proj.weight": (24, 4),
    "model.layers.0.mlp.experts.gate_up_proj": (2, 4, 24),
    "model.layers.0.mlp.experts.down_proj": (2, 12, 4),
    "model.layers.0.self_attn.qkv_proj.weight": (12, 4),
    "transformer.h.0.attn.c_attn.weight": (4, 12),
    "transformer.h.0.mlp.c_fc.weight": (4, 16),
    "transformer.h.0.self_attention.query_key_value.weight": (12, 4),
    "transformer.blocks.0.ffn.experts.mlp.w1": (24, 4),
    "gpt_neox.layers.0.attention.query_key_value.weight": (12, 4),
    "encoder.layer.0.intermediate.dense.weight": (16, 4),
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight": (16, 4),
    "backbone.layers.0.mixer.in_proj.weight": (16, 4),
}
KEYS = sorted(
    {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
        "num_local_experts", "n_routed_experts", "ffn_config", "attn_config", "text_config", "n_head", "n_embd",
        "n_inner",
        "d_model", "d_ff", "multi_query", "new_decoder_architecture", "architectures", "quantization_config",
        "model_type",
        "n_heads", "kv_n_heads", "moe_num_experts", "ffn_hidden_size", "hidden_act", "is_gated_act", "vision_config",
        "torch_dtype", "dtype", "auto_map", "num_kv_heads", "feed_forward_proj",
    }
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**63, -(2**70), 10**400, 0, 1.5, float("inf"), float("nan"), "4", "", "\x1b[2J\x07", *MODELS]),
)
HOSTILE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


def write_table(path: Path, shapes: dict[str, tuple[int, ...]], fill: int = 0) -> None:
    """A file of float32 zeros (or other bytes), written without any library, in one go."""
    table, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        table[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([fill]) * at)


@pytest.fixture(scope="module")
def odd_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for i, side in enumerate(("base", "ft")):
        write_table(folder / side / "model.safetensors", SHAPES, i)
    return folder


@settings(max_examples=150, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    sides=st.tuples(*2 * [st.dictionaries(st.sampled_from(KEYS), HOSTILE, max_size=8)]),
    same=st.booleans(),
)
def test_a_config_of_any_kind_plans_or_is_one_error(
    odd_pair: Path, model: str, sides: tuple[dict[str, Any], ...], same: bool
) -> None:
    for name, config in zip(("base", "ft"), (sides[same], sides[1]), strict=True):
        (odd_pair / name / "config.json").write_text(json.dumps({"model_type": model, **config}))
    try:
        with open_pair(odd_pair / "base", odd_pair / "ft", EditSpec(layers=("ffn", "attention"))) as opened:
            text = json.dumps(opened.plan.to_json())
    except PomeError as error:
        text = str(error)
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "[]", "null", '"x"', "{", "\xff", '{"a": 1e999999}'])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    base, ft = llama_pair(tmp_path)
    (ft / "config.json").write_bytes(text.encode("latin-1"))
    if text.startswith('{"a": 1'):
        edit(base, ft, tmp_path / "out")
    else:
        with pytest.raises(CheckpointError, match=r"config\.json: not"):
            edit(base, ft, tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../b.safetensors", "x/../../y"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    index = json.loads((ft / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (ft / INDEX).write_text(json.dumps(index))
    shutil.copy(ft / SHARD, tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="not a .safetensors file in its folder"):
        edit(base, ft, tmp_path / "out")


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json"])
@pytest.mark.parametrize("what", ["fifo", "device", "folder", "loop", "dangling"])
@pytest.mark.parametrize("side", ["base", "ft"])
def test_a_fifo_or_device_as_a_weight_file_is_refused_at_once(tmp_path: Path, name: str, what: str, side: str) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    path = tmp_path / side / name
    path.unlink()
    put_no_file(path, what)
    with pytest.raises(PomeError) as caught:
        edit(base, ft, tmp_path / "out")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.pome-staging").exists()


def put_no_file(path: Path, what: str) -> None:
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "dangling": "nowhere"}[what])


@pytest.mark.parametrize("what", ["fifo", "device", "folder"])
def test_fifos_and_devices_beside_the_weights_are_left_out(tmp_path: Path, what: str) -> None:
    base, ft = llama_pair(tmp_path)
    put_no_file(ft / "odd", what)
    manifest = edit(base, ft, tmp_path / "out")
    assert not (tmp_path / "out/odd").exists()
    assert what == "folder" or "odd" in manifest.not_copied


@pytest.mark.slow
def test_no_raw_control_character_reaches_a_terminal(tmp_path: Path) -> None:
    """Names of folders, files, tensors and models that would rewrite the screen; runs that work and runs that fail."""
    evil = "\x1b[2J\x07\x9b31m\u202e\r"
    pair = llama_pair(tmp_path / ("x" + evil))
    base, ft = pair
    (ft / ("side" + evil)).write_text("x")
    (ft / "config.json").write_text(json.dumps(LLAMA | {"model_type": "llama" + evil}))
    odd = {f"a{evil}.mlp.up_proj.weight": (12, 4), f"b{evil}.weight": (3, 4)}
    for i, side in enumerate(("odd_base", "odd_ft")):
        write_table(tmp_path / side / "model.safetensors", odd, i)
    write_table(tmp_path / "nan" / "model.safetensors", odd, 255)
    (ft / "loop").symlink_to("loop" + evil)
    out = str(tmp_path / "out")
    commands = [
        [str(base), str(ft), out],  # a dangling link with such a name
        [str(base), str(ft) + "nowhere", out],
        [str(base), str(ft), str(ft / "inside")],
        [str(tmp_path / "odd_base"), str(tmp_path / "nan"), out],
        [str(tmp_path / "odd_base"), str(tmp_path / "odd_ft"), out + evil],
        [str(tmp_path / "odd_base"), str(tmp_path / "odd_ft"), out, "--layers", "down"],
        [str(tmp_path / "odd_base"), str(ft), out],
        [str(tmp_path / "odd_base"), str(tmp_path / "odd_ft"), out, "--layers", "re:" + evil],
    ]
    code = (
        "import sys, json; from pome.cli.app import run_command\n"
        "for command in json.loads(sys.argv[1]): print(run_command(['edit', *command]))"
    )
    ended = run_python("-c", code, json.dumps(commands))
    assert len(ended.stdout.split()) == len(commands), ended.stderr
    assert "Traceback" not in ended.stderr
    raw = {character for character in ended.stderr if not character.isprintable()} - {"\n"}
    assert not raw, [line for line in ended.stderr.splitlines() if not line.isprintable()]


@pytest.mark.parametrize("when", ["begin", "copy", "edit"])
@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("change", ["shrink", "grow", "replace", "remove"])
def test_an_input_that_changes_under_the_run_ends_it(tmp_path: Path, when: str, side: str, change: str) -> None:
    """Between plan and read, between copy and edit, and after the last read: never an OUT of two halves."""
    base, ft = llama_pair(tmp_path)
    path = tmp_path / side / "model.safetensors"

    def disturb() -> None:
        content = path.read_bytes()
        if change == "shrink":
            os.truncate(path, len(content) // 2)
        elif change == "grow":
            path.write_bytes(content + b"x")
        else:
            path.unlink()
            if change == "replace":
                path.write_bytes(content)

    class Disturber(pome.Progress):
        def begin(self, *_: Any) -> None:
            if when == "begin":
                disturb()

        def finish(self, task: str) -> None:
            if task == when:
                disturb()

    with pytest.raises(PomeError) as caught:
        edit(base, ft, tmp_path / "out", progress=Disturber())
    assert "model.safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_that_collide_when_a_prefix_changes(tmp_path: Path) -> None:
    """FT has the tensor with and without BASE's prefix: the equal name pairs, the other is kept and told."""
    shape = (12, 4)
    write_table(tmp_path / "base/model.safetensors", {"model.layers.0.mlp.up_proj.weight": shape})
    both = {"model.layers.0.mlp.up_proj.weight": shape, "layers.0.mlp.up_proj.weight": shape}
    write_table(tmp_path / "ft/model.safetensors", both, 1)
    with open_pair(tmp_path / "base", tmp_path / "ft", EditSpec(allow_missing=True)) as opened:
        (unit,) = opened.plan.units
        assert unit.base_name == unit.name == "model.layers.0.mlp.up_proj.weight"
        assert [kept.name for kept in opened.plan.kept] == ["layers.0.mlp.up_proj.weight"]


def measure_plan(folder: Path, count: int, name: str) -> tuple[float, int]:
    """Seconds of the processor, and the peak of memory, that a plan over `count` matrices takes."""
    for i, side in enumerate(("base", "ft")):
        prefix = ("", "wrapped.")[i]
        write_table(folder / side / "model.safetensors", {prefix + name.format(j): (1, 2) for j in range(count)}, i)
    spec = EditSpec(layers=("re:proj",))
    begun = time.process_time()
    with open_pair(folder / "base", folder / "ft", spec) as opened:
        assert len(opened.plan.units) == count
    seconds = time.process_time() - begun
    tracemalloc.start()
    with open_pair(folder / "base", folder / "ft", spec):
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.{}.up_proj.weight", "t{}.proj"])
def test_a_plan_over_many_tensors_is_linear(tmp_path: Path, name: str) -> None:
    """2,000 against 8,000: four times the work, with room for a busy machine; squared it would be sixteen times.

    The best of three: one measurement may have had a collection of garbage or a neighbour in it.
    """
    tries = [[measure_plan(tmp_path / f"{i}-{n}", n, name) for n in (2_000, 8_000)] for i in range(3)]
    small, large = (min(seconds for seconds, _ in measured) for measured in zip(*tries, strict=True))
    assert large < 8 * small
    assert tries[0][1][1] < 5 * tries[0][0][1]


def test_names_that_all_end_alike_do_not_stall_the_pairing(tmp_path: Path) -> None:
    """Without numbers in them every name of one side could be every name of the other."""
    shapes: tuple[dict[str, tuple[int, ...]], ...] = tuple(
        {f"{side}{j:x}z.mlp.up_proj.weight": (1, 2) for j in range(10_000)} for side in ("a", "b")
    )
    for side, table in zip(("base", "ft"), shapes, strict=True):
        write_table(tmp_path / side / "model.safetensors", table)
    begun = time.process_time()
    with pytest.raises(PomeError), open_pair(tmp_path / "base", tmp_path / "ft", EditSpec()):
        pass
    assert time.process_time() - begun < 20


def test_nothing_of_a_hostile_pair_is_written(tmp_path: Path) -> None:
    """A checkpoint that is refused leaves nothing behind."""
    base = write_checkpoint(tmp_path / "base", {}, config=LLAMA)
    before = hash_tree(tmp_path)
    with pytest.raises(PomeError):
        edit(base, base, tmp_path / "out")
    assert hash_tree(tmp_path) == before
