"""README and the pages of docs: every command, configuration and script in a fenced block runs as it stands.

Names of models and of files are replaced by small folders and files that a test makes; options are not.
"""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from pome.cli.app import run_command
from pome.cli.batch import read_batch
from pome.config.yaml_text import read_config
from support.adapters import make_pair
from support.checkpoints import ROOT, perturb, read_tensors, write_checkpoint
from support.hub_server import TOKEN

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of the Hub's client
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # of its own code, while it loads a model
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def list_blocks(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in one of the languages."""
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            if match["language"] in languages:
                found.append((str(page.relative_to(ROOT)), match["body"]))
    return found


def list_lines() -> list[tuple[str, str]]:
    """(page, command) of every shell line: continuations joined, comments removed."""
    found = []
    for page, body in list_blocks("", "bash", "sh"):
        if page.endswith(("contributing.md", "README.md")) and "src/pome/" in body:
            continue  # the tree of packages
        text = re.sub(r"\\\n\s*", " ", body)
        for line in text.splitlines():
            command = re.sub(r"\s+#.*$", "", line).strip()
            if command:
                found.append((page, command))
    return sorted(set(found))


LINES = list_lines()
POME = [(page, line) for page, line in LINES if line.startswith("pome ")]
# Commands of other programs, by their first words; scripts of the repository must exist.
WORDS = ["a", "cat", "dog", "sat", "on", "mat", "far", "away", "and", "then"]
TASK = """\
task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
OTHERS = ("source .venv/bin/activate", "ln -s ", "pip install .", "hf ", "python scripts/", "scripts/")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages speak of: a base, its fine-tune, an adapter, a merged model, data, a task."""
    folder = tmp_path_factory.mktemp("world")
    pair = make_pair(folder, "llama", r=4, target_modules=["up_proj", "q_proj"])
    pair.save_merged(folder / "merged")
    tensors = read_tensors(pair.base)
    write_checkpoint(
        folder / "fine-tuned", perturb(tensors), config=json.loads((pair.base / "config.json").read_text())
    )
    words = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    for side in ("base", "fine-tuned"):
        special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "[UNK]")
        PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder / side)
    dice = random.Random(0)
    lines = [{"prompt": " ".join(dice.choices(WORDS, k=4)), "completion": f" {dice.choice(WORDS)}"} for _ in range(8)]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"question": dice.choice(WORDS), "choices": dice.sample(WORDS, 3), "answer": i % 3} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny_words.yaml").write_text(TASK.replace("DATA", str(folder / "rows.jsonl")))
    return folder


NAMES = {
    "base": ["BASE", "base", "./base", "$BASE", "mistralai/Mistral-7B-v0.1", "meta-llama/Llama-2-7b-hf"],
    "fine-tuned": ["FT", "fine-tuned", "./fine-tuned", "./ft", "$FT", "meta-math/MetaMath-Mistral-7B"],
    "adapter": ["ADAPTER"],
    "merged": ["MERGED"],
}
SCORERS = "python scripts/score_reactions.py {model}", "python evaluate.py {model}"


def fill(line: str, world: Path, work: Path) -> list[str]:
    """The words of a command with this test's folders in the place of names."""
    places = {name: str(world / folder) for folder, names in NAMES.items() for name in names}
    places |= {name: str(work / "out") for name in ("OUT", "out", "./out", "edited", "best", "metamath-pome")}
    places |= {"held-out.jsonl": str(world / "held-out.jsonl"), "gsm8k,arc_easy": str(world / "tiny_words.yaml")}
    words = [places.get(word, word) for word in shlex.split(line)[1:]]
    return ["echo {model} >/dev/null; echo 1" if word.startswith(SCORERS) else word for word in words]


SLOW = re.compile("--engine ray|--lm-eval")
COMMANDS = [
    pytest.param(page, line, id=f"{page}: {line}", marks=pytest.mark.slow if SLOW.search(line) else [])
    for page, line in POME
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_documented_command_runs(page, line, world, tmp_path, monkeypatch, capsys, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    line, _, target = line.partition(" > ")
    words = fill(line, world, tmp_path)
    if words[0] == "verify":
        assert run_command(["edit", str(world / "base"), str(world / "fine-tuned"), "out", "--quiet"]) == 0
    if words[0] == "batch":
        Path("FILE.yaml").write_text(f"jobs: [{{name: a, base: {world}/base, fine_tuned: {world}/fine-tuned, out: o}}]")
    if "re:experts" in words:
        words += ["--layers", "up"]  # a dense model stands in for the mixture
    if "--ray-address" in words:
        at = words.index("--ray-address")
        del words[at : at + 2]  # Ray on this machine stands in for the cluster
    assert run_command(words) == 0, capsys.readouterr().err
    if target:
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("page", "line"), [item for item in LINES if item not in POME])
def test_other_commands_are_known_and_their_scripts_exist(page, line):
    assert line.startswith(OTHERS), f"{page}: {line}"
    for word in shlex.split(line):
        if word.startswith("scripts/"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize(("page", "text"), list_blocks("yaml"))
def test_every_documented_yaml_block_is_read_by_its_command(page, text, tmp_path):
    document = yaml.safe_load(text)
    file = tmp_path / "file.yaml"
    file.write_text(text)
    if "overrides" in document:
        assert read_config(file)["overrides"]
    elif "defaults" in document:
        assert [job.name for job in read_batch(file)] == [job["name"] for job in document["jobs"]]
    else:
        action = yaml.safe_load((ROOT / "action.yml").read_text())
        steps = document["steps"] if "steps" in document else document["jobs"]["edit"]["steps"]
        assert len(steps) == 1
        assert steps[0]["with"].keys() <= action["inputs"].keys()
        required = {name for name, entry in action["inputs"].items() if entry.get("required")}
        assert required <= steps[0]["with"].keys()


@pytest.mark.parametrize(("page", "text"), [block for block in list_blocks("python") if "pandas" not in block[1]])
def test_every_documented_python_block_runs(page, text, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "fine-tuned", "held-out.jsonl"):
        Path(name).symlink_to(world / name)
    exec(compile(text, page, "exec"), {})
    assert Path("out/pome_manifest.json").is_file()


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
