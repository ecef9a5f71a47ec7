"""README and the pages of docs: every command, configuration and script in a fenced block runs as it stands.

Names of models and of files are replaced by small folders and files that a test makes; options are not.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from pome.__main__ import main as run_pome
from support.checkpoints import ROOT
from support.tiny_models import tiny_config, tiny_model

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
OTHERS = ("source .venv/bin/activate", "ln -s ", "pip install .", "hf ", "python scripts/", "scripts/")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages speak of: a base, its fine-tune, an adapter, a merged model, data, a scorer."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model("LlamaForCausalLM", tiny_config("llama"))
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=4, target_modules=["up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.data.roll(1)
    model.save_pretrained(folder / "fine-tuned")
    return folder


NAMES = {
    "base": ["BASE", "base", "./base", "$BASE", "mistralai/Mistral-7B-v0.1", "meta-llama/Llama-2-7b-hf"],
    "fine-tuned": ["FT", "fine-tuned", "./fine-tuned", "./ft", "$FT", "meta-math/MetaMath-Mistral-7B"],
    "adapter": ["ADAPTER"],
    "merged": ["MERGED"],
}
SCORER = "python scripts/score_reactions.py {model}", "python evaluate.py {model}"


def fill(line: str, world: Path, work: Path) -> list[str]:
    """The words of a command with this test's folders in the place of names."""
    places = {name: str(world / folder) for folder, names in NAMES.items() for name in names}
    outs = {name: str(work / "out") for name in ("OUT", "out", "./out", "edited", "best", "metamath-pome")}
    words = []
    for word in shlex.split(line)[1:]:
        word = places.get(word) or outs.get(word) or word
        if any(word.startswith(start) for start in SCORER):
            word = "echo {model} >/dev/null; echo 1"
        words.append(word)
    return words


@pytest.mark.parametrize(("page", "line"), POME, ids=[f"{page}: {line[:60]}" for page, line in POME])
def test_command_runs(page, line, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line, _, target = line.partition(" > ")
    words = fill(line, world, tmp_path)
    if words[0] == "verify":
        assert run_pome(["edit", str(world / "base"), str(world / "fine-tuned"), str(tmp_path / "out"), "--quiet"]) == 0
    if words[0] == "batch":
        Path("FILE.yaml").write_text(f"jobs: [{{name: a, base: {world}/base, fine_tuned: {world}/fine-tuned, out: o}}]")
    if "--loss" in words or "--lm-eval" in words:
        pytest.fail("made in the next step")
    if "re:experts" in words:
        words += ["--layers", "up"]  # a dense model stands in for the mixture
    assert run_pome(words) == 0, capsys.readouterr().err
    if target:
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("page", "line"), [item for item in LINES if item not in POME])
def test_other_commands_are_known_and_their_scripts_exist(page, line):
    assert line.startswith(OTHERS), f"{page}: {line}"
    for word in shlex.split(line):
        if word.startswith("scripts/"):
            assert (ROOT / word).is_file()
