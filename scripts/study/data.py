"""Texts and tasks of the study: a dictionary to pretrain on, and four tasks of a prompt and one right completion.

Everything comes from packages (scripts/poet_pretraining.py fetches the dictionary, pip the texts with sentiments) or is
generated from a seed. Held-out examples are never among those that are trained on.
"""

from __future__ import annotations

import functools
import io
import random
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from poet_pretraining import fetch_text
from real_weights import SourceArchive, _download_source, _keep, cache_root

VADER = SourceArchive(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, TOKENIZER_TEXT = 2048, 4_000_000
HELD_OUT_SHARE = 20  # one part in so many of the dictionary is kept from training
# fmt: off
NAMES = ["Tom", "Anna", "Ben", "Lucy", "Sam", "Mary", "Paul", "Rosa", "Jack", "Nina", "Karl", "Emma", "Omar", "Ruth",
         "Leo", "Ida"]
THINGS = ["apples", "books", "coins", "shells", "cards", "stones", "pens", "cakes", "plums", "hats", "keys", "nuts"]
PLACES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Bern", "Riga", "Kiev", "Delhi", "Tokyo", "Quito", "Dover"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]
# fmt: on


State = dict[str, Tensor]  # weights by name
Row = tuple[list[int], list[int]]  # token ids, and labels: -100 where nothing is learnt


class Example(NamedTuple):
    """What the model is given, and what it must say."""

    prompt: str
    completion: str


def folder() -> Path:
    """Where the study keeps what it fetches and trains, outside the repository."""
    made = cache_root() / "study"
    made.mkdir(parents=True, exist_ok=True)
    return made


@functools.lru_cache(maxsize=2)
def read_text(name: str) -> tuple[str, str]:
    """A text to pretrain on, and its end, which is held out: `dictionary`, or this repository's `docs` (small)."""
    if name == "docs":
        text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    else:
        text = fetch_text(folder() / "text")
    border = len(text) - len(text) // HELD_OUT_SHARE
    return text[:border], text[border:]


def load_tokenizer(name: str) -> Tokenizer:
    """Byte-level BPE of a text, digits one by one; made once."""
    kept = folder() / f"tokenizer-{name}.json"
    if not kept.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet, special_tokens=["<end>"]
        )
        text = read_text(name)[0][:TOKENIZER_TEXT]
        tokenizer.train_from_iterator((text[at : at + 100_000] for at in range(0, len(text), 100_000)), trainer)
        tokenizer.save(str(kept))
    return Tokenizer.from_file(str(kept))


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """Ids of a long text."""
    pieces = tokenizer.encode_batch([text[at : at + 100_000] for at in range(0, len(text), 100_000)])
    return torch.tensor([token for piece in pieces for token in piece.ids])


def make_sum(dice: random.Random) -> Example:
    """An arithmetic word problem of one step with numbers of at most 12."""
    name, thing, first, second = dice.choice(NAMES), dice.choice(THINGS), dice.randint(2, 12), dice.randint(1, 9)
    if dice.random() < 0.5 and second <= first:
        told, result = f"gives away {second}", first - second
    else:
        told, result = f"finds {second} more", first + second
    return Example(f"{name} has {first} {thing}. {name} {told}. How many {thing}?", f" {result}")


def make_record(dice: random.Random) -> Example:
    """A sentence about a person, to be rewritten as a record in another order and with a numeric date."""
    name, place, month = dice.choice(NAMES), dice.choice(PLACES), dice.randrange(12)
    day, year = dice.randint(1, 28), dice.randint(1700, 1999)
    prompt = f"{name} was born in {place} on {day} {MONTHS[month]} {year}. Record:"
    return Example(prompt, f" date={year}-{month + 1:02}-{day:02}; place={place.upper()}; name={name}")


def read_sentiments() -> list[Example]:
    """Texts about films and products and tweets, with the sign of the mean of twenty human ratings."""

    def extract(work: Path, target: Path) -> None:
        with tarfile.open(_download_source(VADER, work)) as archive:
            member = archive.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            assert member is not None  # a plain file in the archive of that hash
            (target / "ratings.tar.gz").write_bytes(member.read())

    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO((_keep(VADER, extract) / "ratings.tar.gz").read_bytes())) as archive:
        for source in ("movieReviewSnippets", "amazonReviewSnippets", "tweets"):
            member = archive.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            assert member is not None
            for line in member.read().decode("latin-1").splitlines():
                _, rating, text = line.split("\t", 2)
                if abs(float(rating)) >= 0.5 and 20 <= len(text) <= 160:
                    found[text.strip()] = " good" if float(rating) > 0 else " bad"
    return [Example(f"{text} This is", said) for text, said in found.items()]


def read_definitions() -> list[Example]:
    """Short definitions out of the held-out part of the dictionary."""
    entry = re.compile(
        r"\n\n([A-Z][a-z]{3,12}) \\[^\\]{1,40}\\,? ([^.]{1,12}\.)[^\n]*?\. ([A-Z][^\[\]{}\n]{20,110}?\.)"
    )
    text = read_text("dictionary")[1]
    found = {match[1]: Example(f"Define {match[1].lower()}:", f" {match[3]}") for match in entry.finditer(text)}
    return list(found.values())


def split_task(task: str, train: int, test: int) -> tuple[list[Example], list[Example]]:
    """`train` examples to train on and `test` held-out ones of a task, always the same and in one random order."""
    if task in ("sums", "records"):
        make = make_sum if task == "sums" else make_record
        dice = random.Random(f"{task} examples")
        examples = list(dict.fromkeys(make(dice) for _ in range(2 * (train + test))))
    else:
        examples = read_sentiments() if task == "sentiment" else read_definitions()
        random.Random(f"{task} order").shuffle(examples)
    if len(examples) < train + test:
        raise ValueError(f"{task}: only {len(examples)} examples, {train + test} are wanted")
    return examples[test : test + train], examples[:test]
