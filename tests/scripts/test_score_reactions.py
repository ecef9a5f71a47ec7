"""The scorer of the sweep on real reactions: what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import score_reactions
from real_weights import Pair, reactions
from score_reactions import ScoringError, choose, encode, read_data, read_vocabulary

SCRIPT = Path(score_reactions.__file__)
COUNT = 64


def run_script(*arguments: object) -> dict[str, Any]:
    """What the command prints on its last line."""
    run = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(run.stdout.splitlines()[-1])


def score(folder: Path, metric: str = "log-loss", batch_size: int = 32, split: str = "test") -> dict[str, Any]:
    return score_reactions.score(folder, split, COUNT, metric, batch_size)


@pytest.fixture(scope="module")
def scored(rxnfp: Pair) -> dict[str, Any]:
    """The fine-tuned model's result in this process."""
    return score(rxnfp.fine_tuned)


@pytest.fixture
def copy(rxnfp: Pair, tmp_path: Path) -> Path:
    """A copy of the fine-tuned model that a test may spoil."""
    return Path(shutil.copytree(rxnfp.fine_tuned, tmp_path / "copy"))


def test_the_command_prints_the_same_each_time(rxnfp: Pair, scored: dict[str, Any]) -> None:
    assert run_script(rxnfp.fine_tuned, "--count", COUNT) == scored


def test_the_score_is_the_mean_of_its_examples(rxnfp: Pair, scored: dict[str, Any]) -> None:
    assert set(scored) == {"score", "examples", "metrics"} and set(scored["metrics"]) == {"accuracy", "log_loss"}
    assert len(scored["examples"]) == COUNT and min(scored["examples"]) >= 0.0
    assert scored["score"] == scored["metrics"]["log_loss"] == pytest.approx(fmean(scored["examples"]), rel=1e-12)
    by_accuracy = score(rxnfp.fine_tuned, "accuracy")
    assert by_accuracy["metrics"] == scored["metrics"] and set(by_accuracy["examples"]) <= {0.0, 1.0}
    assert by_accuracy["score"] == scored["metrics"]["accuracy"] == pytest.approx(fmean(by_accuracy["examples"]))
    # What is more probable than all else together is the answer, in the same order.
    sure = [i for i, loss in enumerate(scored["examples"]) if loss < math.log(2.0)]
    assert len(sure) > COUNT / 2 and all(by_accuracy["examples"][i] == 1.0 for i in sure)


def test_the_fine_tuned_model_knows_the_classes(rxnfp: Pair, scored: dict[str, Any]) -> None:
    """By chance one in 50 would be right: with other tokens or other labels it is nowhere near."""
    assert scored["metrics"]["accuracy"] > 0.9 and scored["metrics"]["log_loss"] < 0.5
    assert score(rxnfp.fine_tuned, split="train")["metrics"]["accuracy"] > 0.9


def test_the_batches_change_nothing(rxnfp: Pair, scored: dict[str, Any]) -> None:
    # float32 over other shapes sums in another order; a padded token that counted would change the first digit.
    assert score(rxnfp.fine_tuned, batch_size=7)["examples"] == pytest.approx(scored["examples"], rel=1e-3, abs=1e-5)


def test_models_without_the_head_are_refused(rxnfp: Pair, rxnfp_bare: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (rxnfp.base, rxnfp_bare.fine_tuned):
        assert score_reactions.main([str(folder)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "no classifier.weight: it has no classification head" in err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("vocab.txt", "vocab.txt: no such file"),
        ("model.safetensors", "no safetensors weights"),
        ("config.json", "transformers cannot load it"),
    ],
)
def test_a_missing_file_of_the_model_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str], file: str, message: str
) -> None:
    (copy / file).unlink()
    assert score_reactions.main([str(copy), "--count", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="no such folder"):
        score(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"bert.encoder.layer.3.output.dense.weight": None},
            r"lacks 1 weights of the model, as bert\.encoder\.layer\.3",
        ),
        ({"classifier.weight": torch.zeros(2, 256)}, "has 2 rows, but there are 50 classes"),
        ({"classifier.bias": torch.full((50,), torch.nan)}, "not finite"),
    ],
    ids=["a missing weight", "another head", "nan"],
)
def test_weights_that_give_no_score_are_refused(copy: Path, changes: dict[str, torch.Tensor | None], said: str) -> None:
    weights = {**load_file(copy / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScoringError, match=said):
        score(copy)


def test_a_file_that_is_not_safetensors_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"pickle")
    with pytest.raises(ScoringError, match="not a safetensors file"):
        score(copy)


def test_a_vocabulary_without_the_special_tokens_is_refused(copy: Path) -> None:
    (copy / "vocab.txt").write_text("[PAD]\n[CLS]\nC\n")
    with pytest.raises(ScoringError, match=r"lacks \[UNK\], \[SEP\]"):
        score(copy)


def test_the_reactions_are_held_out_and_told_apart() -> None:
    test, train = (read_data(reactions(), split) for split in ("test", "train"))
    assert (len(test.examples), len(train.examples), test.classes) == (33849, 9642, 50)
    texts = [{example.reaction for example in data.examples} for data in (test, train)]
    assert [len(text) for text in texts] == [33849, 9642] and not texts[0] & texts[1]
    assert {example.label for example in test.examples} == set(range(50))
    # The first line of the file, of class 6.1.5: the 36th of the names as text, where 10.1.1 comes before 2.1.1.
    assert test.examples[0].reaction.startswith("C1CCCCC1.CCO.CS(=O)(=O)N1CCN(Cc2ccccc2)CC1.")
    assert test.examples[0].label == 35


def test_the_choice_is_even() -> None:
    examples = read_data(reactions(), "train").examples
    assert choose(examples, 3) == [examples[0], examples[3214], examples[6428]]
    assert choose(examples, len(examples)) == examples
    with pytest.raises(ScoringError, match="only 9642 reactions"):
        choose(examples, 9643)


def test_a_reaction_becomes_its_tokens(rxnfp: Pair) -> None:
    vocabulary = read_vocabulary(rxnfp.fine_tuned)
    names = list(vocabulary)

    def split(reaction: str, longest: int = 512) -> list[str]:
        return [names[i] for i in encode(reaction, vocabulary, longest)]

    tokens = ["[CLS]", "C", "Cl", ".", "[Na+]", ">>", "Br", "c", "1", "[SEP]"]
    assert split("CCl.[Na+]>>Brc1") == tokens
    assert split("CCl.[Na+]>>Brc1", longest=5) == [*tokens[:4], "[SEP]"]
    assert split("C[Xx]") == ["[CLS]", "C", "[UNK]", "[SEP]"]
