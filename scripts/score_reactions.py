#!/usr/bin/env python3
"""Score a reaction classifier on labelled reactions: the scorer of the sweep on the pair that rxnfp ships.

    scripts/score_reactions.py MODEL [--split test|train] [--count 2000] [--metric log-loss|accuracy] [--batch-size N]

MODEL is a folder with safetensors weights, config.json and vocab.txt: rxnfp's fine-tune, as scripts/real_weights.py
converts it, or what pome makes of it. The last line of stdout is one JSON object: `score` (the mean of the metric),
`examples` (its value for each reaction, always the same reactions in the same order) and `metrics` (both means). Of
log-loss (in nats) less is better. Exit status 1 and a message where MODEL cannot be scored, as the pretrained base,
which has no head for the 50 classes.

Test reactions that also stand among the train ones (2,613 of 40,000) are never scored, and a repeated one once.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from real_weights import RealWeightsError, reactions

# The expression of rxnfp's tokenization.py (MIT); what it does not match has no token.
TOKEN = re.compile(
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|"
    r"\%[0-9]{2}|[0-9])"
)
HEAD = "classifier.weight"


class ScoringError(RuntimeError):
    """The model cannot be scored; the message says why."""


class Example(NamedTuple):
    """A reaction in SMILES and the index of its class."""

    reaction: str
    label: int


class Data(NamedTuple):
    """The reactions of one split that may be scored, and the number of classes of the whole set."""

    examples: list[Example]
    classes: int


def read_data(file: Path, split: str) -> Data:
    """The distinct reactions of `split`, in the file's order; of the test split those that are not train ones."""
    with open(file, encoding="ascii", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    # rxnfp numbers the classes in the order of their names as text.
    labels = {name: i for i, name in enumerate(sorted({row["rxn_class"] for row in rows}))}
    trained = {row["rxn"] for row in rows if row["split"] == "train"}
    found = {row["rxn"]: labels[row["rxn_class"]] for row in rows if row["split"] == split}
    kept = [Example(*item) for item in found.items() if split == "train" or item[0] not in trained]
    return Data(kept, len(labels))


def choose(examples: list[Example], count: int) -> list[Example]:
    """`count` of the examples, evenly spread over their order."""
    if count > len(examples):
        raise ScoringError(f"--count {count}: this split has only {len(examples)} reactions to score")
    return [examples[i * len(examples) // count] for i in range(count)]


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id: the line of vocab.txt that it stands on."""
    file = folder / "vocab.txt"
    if not file.is_file():
        raise ScoringError(f"{file}: no such file; copy it from the model that MODEL was made of")
    vocabulary = {token: i for i, token in enumerate(file.read_text(encoding="utf-8").splitlines())}
    lacking = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if lacking:
        raise ScoringError(f"{file}: lacks {', '.join(lacking)}: not the vocabulary of a reaction BERT")
    return vocabulary


def encode(reaction: str, vocabulary: dict[str, int], longest: int) -> list[int]:
    """The ids of a reaction's tokens between [CLS] and [SEP], at most `longest` in all."""
    unknown = vocabulary["[UNK]"]
    ids = [vocabulary.get(token, unknown) for token in TOKEN.findall(reaction)]
    return [vocabulary["[CLS]"], *ids[: longest - 2], vocabulary["[SEP]"]]


def check_head(folder: Path, classes: int) -> None:
    """Refuse a checkpoint without a head of `classes` rows, by its headers: it would be scored with a random one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ScoringError(f"{folder}: no safetensors weights there")
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                if HEAD not in weights.keys():  # noqa: SIM118  (a handle, not a mapping)
                    continue
                rows = weights.get_slice(HEAD).get_shape()[0]
        except SafetensorError as error:
            raise ScoringError(f"{file}: not a safetensors file: {error}") from error
        if rows != classes:
            raise ScoringError(f"{file}: {HEAD} has {rows} rows, but there are {classes} classes of reactions")
        return
    raise ScoringError(f"{folder}: no {HEAD}: it has no classification head, so it cannot be scored")


def load_model(folder: Path, vocabulary: dict[str, int], classes: int) -> Any:
    """The classifier in float32 on the CPU, every weight of it from the checkpoint."""
    # Imported here: it takes seconds, and what is refused is refused before.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=classes,  # config.json contradicts itself: 50 num_labels, 2 in id2label
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ScoringError(f"{folder}: transformers cannot load it: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ScoringError(f"{folder}: lacks {len(missing)} weights of the model, as {missing[0]}")
    if len(vocabulary) > model.config.vocab_size:
        raise ScoringError(f"{folder}: vocab.txt has {len(vocabulary)} tokens, the model {model.config.vocab_size}")
    return model.eval()


def classify(model: Any, encoded: list[list[int]], padding: int, batch_size: int) -> Tensor:
    """Log-probabilities, examples x classes in float64, in the order given."""
    # Sorted by length, since a batch is padded to its longest.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = [torch.tensor(encoded[i]) for i in order[start : start + batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=padding)
            logits = model(input_ids=ids, attention_mask=(ids != padding).long()).logits
            found.append(torch.log_softmax(logits.double(), 1))
    return torch.cat(found)[torch.tensor(order).argsort()]


def score(folder: Path, split: str, count: int, metric: str, batch_size: int) -> dict[str, Any]:
    """What is printed. Raises ScoringError, and RealWeightsError where the reactions cannot be had."""
    if not folder.is_dir():
        raise ScoringError(f"{folder}: no such folder")
    vocabulary = read_vocabulary(folder)
    data = read_data(reactions(), split)
    examples = choose(data.examples, count)
    check_head(folder, data.classes)
    model = load_model(folder, vocabulary, data.classes)
    longest = model.config.max_position_embeddings
    encoded = [encode(example.reaction, vocabulary, longest) for example in examples]
    logs = classify(model, encoded, vocabulary["[PAD]"], batch_size)
    if not bool(torch.isfinite(logs).all()):
        raise ScoringError(f"{folder}: the model's answers are not finite")
    labels = torch.tensor([example.label for example in examples])
    values = {
        "accuracy": (logs.argmax(1) == labels).double(),
        "log_loss": -logs.gather(1, labels[:, None])[:, 0],
    }
    means = {name: float(each.mean()) for name, each in values.items()}
    chosen = metric.replace("-", "_")
    return {"score": means[chosen], "examples": values[chosen].tolist(), "metrics": means}


def read_count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--split", choices=["test", "train"], default="test")
    parser.add_argument("--count", type=read_count, default=2000, help="reactions to score (default: %(default)s)")
    parser.add_argument("--metric", choices=["log-loss", "accuracy"], default="log-loss")
    parser.add_argument("--batch-size", type=read_count, default=32, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        result = score(options.model, options.split, options.count, options.metric, options.batch_size)
    except (ScoringError, RealWeightsError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
