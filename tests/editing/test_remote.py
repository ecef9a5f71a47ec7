"""What a worker on another machine does with a unit, from pickled paths and options alone: the bytes of a run here."""

import pickle

import pytest
import torch

import pome
from pome.checkpoint.source import find_location
from pome.config.spec import EditSpec
from pome.editing.remote import EditJob
from pome.editing.session import open_pair
from pome.output.copying import copy_files
from pome.output.progress import Progress
from pome.output.staging import Staging
from pome.planning.split import count_cores
from support.adapters import make_pair
from support.checkpoints import hash_tree, llama_pair, perturb, random_llama, write_checkpoint


def edit_by_executor(base, ft, spec, folder):
    """Every unit of an edit by an executor that was opened from a pickled job; the folder that it wrote into."""
    with (
        open_pair(base, ft, spec, whole=True) as opened,
        Staging(folder / "executor", {}, fresh=False) as staging,
    ):
        copy_files(opened.template, staging, Progress())
        places = [find_location(side, spec.dequantize) for side in (opened.base, opened.ft)]
        merges = opened.template.weights is opened.base
        job = EditJob(*places, merges, staging.output, spec, count_cores(), None)
        executor = pickle.loads(pickle.dumps(job)).open("cpu", 1)
        for unit in opened.plan.units:
            sent = pickle.loads(pickle.dumps(unit))
            patch = executor.work(sent, executor.read(sent))
            assert patch.data is None and len(pickle.dumps(patch)) < 20_000  # a record, not a tensor
        executor.flush()
    assert len(pickle.dumps(job)) < 20_000
    return staging.output


def check(base, ft, spec, folder):
    out = edit_by_executor(base, ft, spec, folder)
    pome.edit(base, ft, folder / "out", spec)
    expected = hash_tree(folder / "out")
    del expected["pome_manifest.json"]
    assert hash_tree(out) == expected


@pytest.mark.parametrize("options", [{}, {"layers": "ffn", "rank_ratio": 0.25}, {"dtype": "float32"}])
def test_remote_edit_of_a_full_pair_equals_a_local_one(tmp_path, options):
    check(*llama_pair(tmp_path, shards=2, dtype=torch.bfloat16), EditSpec(**options), tmp_path)


def test_tied_weights_that_are_stored_twice(tmp_path):
    base = random_llama()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    ft = perturb(base)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 40, "tie_word_embeddings": True}
    sides = [write_checkpoint(tmp_path / n, t, config=config) for n, t in (("base", base), ("ft", ft))]
    check(*sides, EditSpec(layers="embed"), tmp_path)


def test_an_adapter_that_is_merged(tmp_path):
    pair = make_pair(tmp_path, "llama", r=4, target_modules=["up_proj", "q_proj"])
    check(pair.base, pair.adapter, EditSpec(), tmp_path)


def test_a_base_of_which_ranges_are_read_from_the_hub_is_downloaded_for_the_workers(hub, tmp_path):
    base, ft = llama_pair(tmp_path, shards=2)
    hub.add("org/base", base)
    with open_pair("org/base", ft, EditSpec(), whole=True) as opened:
        assert all(weights.file.stored is None for weights in opened.base.files.values())
        place = find_location(opened.base, False)
        assert opened.base.folder is None  # what is recorded of it stays as it is
    assert all("snapshots" in path.parts for path in place.paths.values())
    assert {n: p.read_bytes() for n, p in place.paths.items()} == {n: (base / n).read_bytes() for n in place.paths}
    check("org/base", ft, EditSpec(), tmp_path)


def test_a_file_that_is_gone_is_named(tmp_path):
    base, ft = llama_pair(tmp_path)
    with open_pair(base, ft, EditSpec(), whole=True) as opened:
        place = find_location(opened.ft, False)
    (ft / "model.safetensors").unlink()
    with pytest.raises(pome.CheckpointError, match=r"ft/model\.safetensors: cannot be opened"):
        place.open()
