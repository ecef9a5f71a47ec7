"""The model card of an extracted adapter and its upload: held to PEFT, torch.linalg.svd, and a local Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from safetensors.torch import load_file, save_file

import pome
from pome import ExtractSpec, Manifest
from pome.cli.app import run_command
from pome.manifest import FileRecord, LostRecord
from pome.output.extract_card import make_extract_card
from support.adapters import TOKENS, quietly
from support.cards import FT_CARD, read_card
from support.checkpoints import StopAfter, hash_tree, llama_pair, read_tensors
from support.extraction import Trained, train
from support.hub_server import TOKEN, HubServer

# The Hub's library passes file objects to its HTTP library in a way that the latter wants otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SPEC = ExtractSpec(rank=3)


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    base, ft = llama_pair(tmp_path)
    (ft / "README.md").write_text(FT_CARD)
    (ft / "tokenizer.json").write_text("{}")
    hub.add("org/base", base)
    hub.add("org/ft", ft)
    return base, ft


def find_command(text: str, start: str = "pome extract") -> list[str]:
    return shlex.split(next(line for line in text.splitlines() if line.startswith(start)))


def test_a_card_is_that_of_an_adapter_and_its_command_makes_it_again(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--layers", "up", "--layers", "q", "--exclude", r"layers\.0\.mlp", "--rank", "1", "--save-modules"]
    assert run_command(["extract", "org/base", "org/ft", str(out), *options, "--card", "--quiet"]) == 0
    card = read_card(out)
    assert (card.data.library_name, card.data["base_model_relation"]) == ("peft", "adapter")
    assert card.data.base_model == ["org/base"]
    assert card.data.tags == ["math", "pome", "lora", "transformers", "model-editing"]
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("llama2", "en", "text-generation")
    assert (card.data.datasets, card.data["extra_gated_prompt"]) == (["org/data"], "Be kind")
    assert "model-index" not in card.content  # FT's results are not this model's
    base_head, ft_head = hub.repos["org/base"].head, hub.repos["org/ft"].head
    sides = [f"org/base@{base_head}", f"org/ft@{ft_head}"]
    command = find_command(card.text)
    assert command == ["pome", "extract", *sides, "OUT", *options]
    assert find_command(card.text, "pome verify") == ["pome", "verify", "OUT", "--base", sides[0], "--ft", sides[1]]
    assert f'from_pretrained("org/base", revision="{base_head}")' in card.text
    assert f"https://huggingface.co/org/ft/tree/{ft_head}" in card.text
    assert "# The update of ft as a LoRA\n" in card.text and "A PEFT LoRA of rank 1 for [org/base]" in card.text
    assert card.text.rstrip().endswith(FT_CARD.partition("# Tuned")[2].rstrip())
    content = (out / "README.md").read_bytes()
    manifest = Manifest.from_json((out / "pome_manifest.json").read_bytes(), "out")
    assert manifest.files["README.md"].sha256 == hashlib.sha256(content).hexdigest()
    assert "README.md" not in manifest.not_copied
    assert pome.verify(out, "org/base", "org/ft", full=True).ok
    command[command.index("OUT")] = str(tmp_path / "again")
    assert run_command([*command[1:], "--card", "--quiet"]) == 0
    made, repeated = hash_tree(out), hash_tree(tmp_path / "again")
    del made["pome_manifest.json"], repeated["pome_manifest.json"]
    assert made == repeated and "README.md" in made


def test_of_an_ft_on_the_hub_the_card_alone_is_fetched_beside_the_weights(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pome.extract("org/base", "org/ft", tmp_path / "plain", SPEC)
    assert not (tmp_path / "plain/README.md").exists() and hub.count("README") == 0
    made = pome.extract("org/base", "org/ft", tmp_path / "out", SPEC, card=True)
    assert hub.count("GET .*README") == 1 and hub.count("tokenizer") == 0
    assert read_card(tmp_path / "out").data.license == "llama2"
    for repo in ("org/base", "org/ft"):
        snapshot_download(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pome.extract("org/base@" + str(made.base.revision), "org/ft@" + str(made.fine_tuned.revision),
                 tmp_path / "offline", SPEC, card=True)  # fmt: skip
    assert (tmp_path / "offline/README.md").read_bytes() == (tmp_path / "out/README.md").read_bytes()


def test_a_card_of_ft_that_cannot_be_fetched_is_an_error_before_the_work(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.fail("README", status=403, times=10**6)
    with pytest.raises(pome.HubError, match=r"org/ft@\w{7}/README.md: the Hub answered 403"):
        pome.extract("org/base", "org/ft", tmp_path / "out", SPEC, card=True)
    assert not list(tmp_path.glob("out*"))


def test_an_ft_without_a_card_gives_one(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / "README.md").unlink()
    hub.add("org/plain", pair[1])
    texts = set()
    for name, ft in (("hub", "org/plain"), ("local", pair[1]), ("file", pair[1] / "model.safetensors")):
        pome.extract("org/base", ft, tmp_path / name, SPEC, card=True)
        card = read_card(tmp_path / name)
        assert card.data.base_model == ["org/base"] and "Card of the fine-tuned model" not in card.text
        texts.add(
            card.text.partition("## Load it")[0].replace("The update of plain", "The update of a fine-tuned model")
        )
    assert len(texts) == 2  # those of a folder and of a file are the same


def test_the_card_of_local_checkpoints_holds_no_path(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = pome.extract(*pair, tmp_path / "out", SPEC, card=True)
    assert {"config.json", "tokenizer.json"} == made.not_copied.keys()
    card = read_card(tmp_path / "out")
    for part in (str(tmp_path), "/home", "/me/", "~/", "/out", str(Path.home()) + "/"):
        assert part not in card.content
    assert "base_model" not in card.content and card.data.library_name == "peft"
    assert find_command(card.text) == ["pome", "extract", "BASE", "FT", "OUT", "--rank", "3"]
    (pair[1] / "README.md").write_text("---\nbase_model: [org/mother, /x]\nlibrary_name: transformers\n---\n")
    pome.extract(*pair, tmp_path / "other", SPEC, card=True)
    card = read_card(tmp_path / "other")
    assert (card.data.base_model, card.data.library_name) == (["org/mother"], "peft")
    assert card.data.pipeline_tag == "text-generation"


def test_the_table_has_the_energy_of_each_role(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pome.extract(*pair, tmp_path / "out", SPEC, card=True)
    text = read_card(tmp_path / "out").text
    base, ft = (read_tensors(side) for side in pair)
    roles = {"up": "up_proj", "down": "down_proj", "q": "q_proj"}
    kept = whole = 0.0
    for name in base:
        if "proj" in name:
            sigma = torch.linalg.svdvals(ft[name].double() - base[name].double()).square()
            kept, whole = kept + float(sigma[:3].sum()), whole + float(sigma.sum())
    assert f"updates: {kept / whole:.3f} over all of them" in text
    for role, part in roles.items():
        sigmas = [
            torch.linalg.svdvals(ft[name].double() - base[name].double()).square() for name in base if part in name
        ]
        energy = sum(float(s[:3].sum()) for s in sigmas) / sum(float(s.sum()) for s in sigmas)
        least = min(float(s[:3].sum() / s.sum()) for s in sigmas)
        assert f"| {role} | {len(sigmas)} | 3 | {energy:.3f} | {least:.3f} |" in text


def run_snippet(out: Path, pair: Trained) -> Any:
    """The model that the code of a card loads."""
    code = re.search("```python\n(.*?)```", read_card(out).text, re.DOTALL)
    assert code is not None and len(code[1].splitlines()) == 4
    names: dict[str, Any] = {}
    with quietly():
        exec(code[1].replace('"BASE"', repr(str(pair.base))).replace('"OUT"', repr(str(out))), names)
    return names["model"].eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_the_code_of_a_card_loads_the_adapter_as_peft_does(architecture: str, tmp_path: Path) -> None:
    pair = train(tmp_path, architecture)
    pome.extract(pair.base, pair.ft, tmp_path / "out", ExtractSpec(rank=4), card=True)
    model, wanted = run_snippet(tmp_path / "out", pair), pair.load_adapted(tmp_path / "out")
    assert type(model.get_base_model()) is type(wanted.get_base_model())
    inputs = {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if architecture == "t5" else {})}
    with quietly(), torch.no_grad():
        logits, others = model(**inputs).logits, pair.load(pair.base)(**inputs).logits
        assert torch.allclose(logits, wanted(**inputs).logits, rtol=1e-4, atol=1e-5)  # another kernel of attention
    assert not torch.allclose(logits, others, rtol=1e-3, atol=1e-3)


def test_what_is_lost_saved_and_resized_is_said(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama")
    made = pome.extract(pair.base, pair.ft, tmp_path / "out", SPEC, card=True)
    norm = sum(record.norm**2 for record in made.lost) ** 0.5
    lost = read_card(tmp_path / "out").text.partition("## What it does not hold")[2].partition("##")[0]
    assert f"- {len(made.lost)} tensors changed by a norm of {norm:.3g}: --save-modules takes them along" in lost
    assert f"`{max(made.lost, key=lambda record: record.norm).name}`" in lost
    with quietly():
        model = pair.load(pair.ft)
        model.resize_token_embeddings(103)
        model.save_pretrained(pair.ft)
    made = pome.extract(pair.base, pair.ft, tmp_path / "saved", dataclasses.replace(SPEC, save_modules=True), card=True)
    text = read_card(tmp_path / "saved").text
    assert "Nothing but what the ranks above leave out." in text
    assert f"{len(made.saved)} tensors of FT" in text and "`lm_head.weight`" in text
    assert "call model.resize_token_embeddings(103) before PEFT loads it." in text


def test_a_name_from_a_stranger_stays_within_its_code(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = pome.extract(*pair, tmp_path / "out", SPEC)
    lost = LostRecord("a`](x)\n# Bad\n![b](c)", None, "other", 1.0, 0.5, "it is so")
    text = ModelCard(make_extract_card(dataclasses.replace(made, lost=(lost,)), None, None)).text
    assert "- 1 tensor changed by a norm of 1: it is so (`a'](x)\\n# Bad\\n![b](c)` 1, 0.5 of BASE's)\n" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 2}, "A PEFT LoRA of rank 2 for"),
        ({"energy": 0.5}, "A PEFT LoRA of ranks "),
        ({"energy": 0.5, "uniform_rank": True}, ", filled up with zeros to "),
        ({"rank": 2}, "each as its best approximation of that rank"),
        ({"rank": 2, "beta": 2.0}, "weighted by their singular values to the power 1."),
        ({"rank": 2, "power": 0.0, "scale": "frobenius"}, "each equalized by POME ([arXiv"),
        ({"rank": 2, "overrides": [{"match": "up", "power": 0.5}]}, "to the power 0.5 or 1."),
    ],
)
def test_the_card_says_what_the_options_made_and_how(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    pome.extract("org/base", "org/ft", tmp_path / "out", ExtractSpec.from_mapping(options), card=True)
    text = read_card(tmp_path / "out").text
    assert said in text
    monkeypatch.chdir(tmp_path)
    if "overrides" in options:
        Path("extract.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    command = find_command(text)[1:]
    command[command.index("OUT")] = "again"
    assert run_command([*command, "--card", "--quiet"]) == 0
    assert Path("again/README.md").read_bytes() == Path("out/README.md").read_bytes()
    assert Path("again/adapter_model.safetensors").read_bytes() == Path("out/adapter_model.safetensors").read_bytes()


def test_a_pair_without_a_change_has_a_card(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    same = load_file(base / "model.safetensors")
    (tmp_path / "same").mkdir()
    (tmp_path / "same/config.json").write_bytes((base / "config.json").read_bytes())
    save_file(same, tmp_path / "same/model.safetensors", {"format": "pt"})
    pome.extract(base, tmp_path / "same", tmp_path / "out", SPEC, card=True)
    text = read_card(tmp_path / "out").text
    assert "No LoRA: no selected matrix changed." in text and "Nothing but what" in text


def test_a_run_with_a_card_and_one_without_do_not_go_on_from_each_other(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pome.extract(*pair, tmp_path / "out", SPEC, StopAfter(4), card=True)
    with pytest.raises(pome.OutputError, match="it differs in card"):
        pome.extract(*pair, tmp_path / "out", SPEC)
    pome.extract(*pair, tmp_path / "out", SPEC, card=True)
    pome.extract(*pair, tmp_path / "whole", SPEC, card=True)
    made, wanted = hash_tree(tmp_path / "out"), hash_tree(tmp_path / "whole")
    del made["pome_manifest.json"], wanted["pome_manifest.json"]
    assert made == wanted and "README.md" in made


def test_verify_finds_a_changed_card_and_a_file_that_no_adapter_has(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = pome.extract(*pair, out, SPEC, card=True)
    assert pome.verify(out, *pair, full=True).ok
    (out / "tokenizer.json").write_text("{}")
    stray = FileRecord(2, hashlib.sha256(b"{}").hexdigest())
    sealed = dataclasses.replace(made, files={**made.files, "tokenizer.json": stray}).sealed()
    (out / "pome_manifest.json").write_text(sealed.to_json())
    found = pome.verify(out, *pair).differences
    assert [(item.file, item.what) for item in found] == [("tokenizer.json", "no input has such a file")]
    with (out / "README.md").open("a") as file:
        file.write("More.\n")
    assert [item.file for item in pome.verify(out).differences] == ["README.md"]


def push(out: Path, *more: str) -> int:
    words = ["extract", "org/base", "org/ft", str(out), "--rank", "3", "--push-to-hub", "me/new", "--quiet"]
    return run_command([*words, *more])


def test_a_push_makes_the_repository_and_what_is_there_is_the_adapter(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(tmp_path / "out", "--dry-run") == 0
    assert "me/new" not in hub.repos and not list(tmp_path.glob("out*"))
    assert push(tmp_path / "out", "--private") == 0
    repo = hub.repos["me/new"]
    assert repo.private and repo.messages == ["Upload an output of pome"]
    there = {name: hashlib.sha256(content).hexdigest() for name, content in repo.commits[repo.head].items()}
    del there[".gitattributes"]
    assert there == hash_tree(tmp_path / "out")
    assert b"base_model:\n- org/base\n" in repo.commits[repo.head]["README.md"]
    assert pome.verify("me/new", "org/base", "org/ft", full=True).ok  # as someone else gets it


def test_a_push_without_a_token_is_refused_before_any_work(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: me/new: you are not logged in; log in with `hf auth login` or set HF_TOKEN"
    ]
    assert hub.count("safetensors|storage") == 0 and not list(tmp_path.glob("out*"))


def test_an_upload_that_fails_leaves_the_adapter_and_a_batch_goes_on_from_there(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file, out = tmp_path / "jobs.yaml", tmp_path / "out"
    job = f"command: extract, base: org/base, fine_tuned: org/ft, out: {out}, rank: 3"
    file.write_text(f"jobs:\n  - {{{job}, push_to_hub: me/new, private: true}}\n")
    hub.fail("commit/main", status=403)
    assert run_command(["batch", str(file)]) == 1
    again = f"{out} is complete, upload it with `hf upload me/new {out} . --create-pr --private`"
    assert again in capsys.readouterr().err and pome.verify(out).ok
    before = hash_tree(out)
    assert run_command(["batch", str(file)]) == 0
    assert "done by an earlier run" in capsys.readouterr().err and hash_tree(out) == before
    repo = hub.repos["me/new"]
    assert repo.private and repo.commits[repo.head]["README.md"] == (out / "README.md").read_bytes()


def test_a_batch_that_asks_for_a_card_does_not_take_an_adapter_without_one(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "jobs.yaml", tmp_path / "out"
    job = f"command: extract, base: {pair[0]}, fine_tuned: {pair[1]}, out: {out}, rank: 3"
    file.write_text(f"jobs:\n  - {{{job}}}\n")
    assert [run_command(["batch", str(file)]) for _ in range(2)] == [0, 0]
    assert "done by an earlier run" in capsys.readouterr().err
    file.write_text(f"jobs:\n  - {{{job}, card: true}}\n")
    assert run_command(["batch", str(file)]) == 1
    assert f"{out}: exists" in capsys.readouterr().err
    file.write_text(f"jobs:\n  - {{{job}, card: true, overwrite: true}}\n")
    assert run_command(["batch", str(file)]) == 0
    file.write_text(f"defaults: {{card: true}}\njobs:\n  - {{{job}}}\n")
    assert run_command(["batch", str(file)]) == 0
    assert "done by an earlier run" in capsys.readouterr().err and read_card(out).data.library_name == "peft"
