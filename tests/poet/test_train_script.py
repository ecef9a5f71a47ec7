"""scripts/train_poet.py: every method gives a checkpoint of transformers, and an interrupted run goes on bitwise."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import train_poet
from pome.poet import wrap


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny Llama with a byte tokenizer, and a file of sums."""
    folder = tmp_path_factory.mktemp("start")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    rows = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(20)] + [{"text": "1 + 1 = 2"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(monkeypatch, start, out, method, *more):
    line = ["train_poet.py", start, start / "data.jsonl", out, "--method", method, "--batch", "6", "--epochs", "3"]
    line += ["--matrix-lr", "0.01", "--lr", "0.001", "--save-every", "3", "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    train_poet.main()


@pytest.mark.slow
@pytest.mark.parametrize("method", train_poet.METHODS)
def test_an_interrupted_run_goes_on_bitwise(method, start, tmp_path, monkeypatch):
    options = ("--block-size", "6", "--merge-every", "4", "--micro", "4", "--ramp", "2")
    if method == "muon" and not hasattr(torch.optim, "Muon"):
        with pytest.raises(SystemExit, match="has no Muon"):
            run(monkeypatch, start, tmp_path / "no", method, *options)
        return
    run(monkeypatch, start, tmp_path / "whole", method, *options)
    real, seen = train_poet.run_step, []

    def fail_at_the_ninth(*arguments):
        seen.append(1)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train_poet, "run_step", fail_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, start, tmp_path / "cut", method, *options)
    with pytest.raises(SystemExit, match=r"begun with other options \(seed\)"):
        run(monkeypatch, start, tmp_path / "cut", method, *options, "--seed", "1")
    run(monkeypatch, start, tmp_path / "cut", method, *options)
    assert len(seen) == 9 + 12 - 6
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 13))
    assert [row["step"] for row in log if row["merged"]] == ([4, 8, 12] if method.startswith("poet") else [])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (tmp_path / "whole" / "training.pt").exists()
    with pytest.raises(SystemExit, match="finished checkpoint"):
        run(monkeypatch, start, tmp_path / "whole", method, *options)


@pytest.mark.slow
def test_poet_keeps_the_spectra_and_learns(start, tmp_path, monkeypatch):
    run(monkeypatch, start, tmp_path / "out", "poet-bs", "--block-size", "6", "--epochs", "15", "--merge-every", "9")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (start, tmp_path / "out"))
    names = [layer.name for layer in wrap(before).wrapped]
    assert len(names) == 7
    for name in names:
        old, new = (model.get_submodule(name).weight.detach() for model in (before, after))
        torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(old), rtol=1e-4, atol=1e-5)
        assert (new - old).norm() > 1e-2 * old.norm()


@pytest.mark.slow
def test_a_prompt_is_not_learnt(start):
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    ids, labels = train_poet.read_examples(start / "data.jsonl", tokenizer, 64)[3]
    assert tokenizer.decode(ids) == "3 + 1 = 4<end>"
    assert labels == [-100] * 8 + ids[8:]
    batch = train_poet.pad([(ids, labels), (ids[:3], labels[:3])], 0)
    assert batch["attention_mask"].sum(1).tolist() == [10, 3] and (batch["labels"][1] == -100).all()
