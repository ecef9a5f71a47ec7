"""The model card of an output and its upload, against a local Hub; what a card must never say."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import pome
from pome import EditSpec, Manifest
from pome.cli.app import run_command
from pome.cli.batch import read_batch
from pome.config.outputs import Publication
from pome.errors import HubError, SpecError
from pome.manifest import SideRecord, TensorRecord
from pome.output.card import make_card
from pome.output.upload import push_output
from support.cards import FT_CARD, read_card
from support.checkpoints import assert_only_edited, hash_tree, llama_pair
from support.hub_server import TOKEN, Fault, HubServer

# The Hub's library passes file objects to its HTTP library in a way that the latter wants otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    base, ft = llama_pair(tmp_path)
    (ft / "README.md").write_text(FT_CARD)
    hub.add("org/base", base)
    hub.add("org/ft", ft)
    return base, ft


def test_without_card_the_readme_is_fts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, ft = pair
    manifest = pome.edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", [record.name for record in manifest.tensors])


def test_a_card_names_repositories_and_the_command(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["edit", "org/base", "org/ft", str(out), "--layers", "up,gate", "--rank", "4", "--beta", "1.5"]
    assert run_command([*arguments, "--exclude", r"layers\.0\.mlp\.gate", "--device", "cpu", "--card", "--quiet"]) == 0
    card = read_card(out)
    assert card.data.base_model == ["org/ft"]
    assert card.data["base_model_relation"] == "finetune"
    assert card.data.tags == ["math", "pome", "model-editing"]
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("llama2", "en", "text-generation")
    assert card.data["extra_gated_prompt"] == "Be kind"
    assert card.data.datasets == ["org/data"]
    assert "model-index" not in card.content  # FT's results are not this model's
    base_head, ft_head = hub.repos["org/base"].head, hub.repos["org/ft"].head
    command = next(line for line in card.text.splitlines() if line.startswith("pome edit"))
    options = ["--layers", "up", "--layers", "gate", "--exclude", r"layers\.0\.mlp\.gate", "--rank", "4"]
    wanted = ["pome", "edit", f"org/base@{base_head}", f"org/ft@{ft_head}", "OUT", *options, "--beta", "1.5"]
    assert shlex.split(command) == wanted
    assert "arxiv.org/abs/2510.06627" in card.text
    assert f"https://huggingface.co/org/ft/tree/{ft_head}" in card.text
    assert "| up | 2 | 40 x 16 | 16 | 4 |" in card.text
    assert "| gate | 1 | 40 x 16 | 16 | 4 |" in card.text
    assert card.text.rstrip().endswith(FT_CARD.partition("# Tuned")[2].rstrip())  # a public card is quoted as it is
    # Its hash is in the manifest, and the command that it gives makes the same output.
    content = (out / "README.md").read_bytes()
    manifest = Manifest.from_json((out / "pome_manifest.json").read_bytes(), "out")
    assert manifest.files["README.md"].sha256 == hashlib.sha256(content).hexdigest()
    assert pome.verify(out).ok
    again = shlex.split(command)[1:]
    again[again.index("OUT")] = str(tmp_path / "again")
    assert run_command([*again, "--device", "cpu", "--card", "--quiet"]) == 0
    assert (tmp_path / "again/README.md").read_bytes() == content
    made, repeated = hash_tree(out), hash_tree(tmp_path / "again")
    del made["pome_manifest.json"], repeated["pome_manifest.json"]
    assert made == repeated


def test_the_card_of_local_checkpoints_holds_no_path(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, ft = pair
    pome.edit(base, ft, tmp_path / "out", card=True)
    card = read_card(tmp_path / "out")
    text = card.content
    for part in (str(tmp_path), "/home", "/me/", "~/", "/out", str(Path.home()) + "/"):
        assert part not in text
    assert "base_model" not in text
    assert "fine-tuned version of [llama] on train," in text
    assert "see https://example.org/a/b and `and/or` 1/2, </div>." in text
    assert "pome edit BASE FT OUT\n" in text


def test_a_local_ft_of_a_hub_base_is_a_finetune_of_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, ft = pair
    pome.edit("org/base", ft, tmp_path / "out", card=True)
    assert read_card(tmp_path / "out").data.base_model == ["org/base"]


def test_overrides_are_told_as_the_file_that_says_them(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [{"match": r"layers\.1\.", "beta": 2.0}]
    spec = pome.EditSpec(rank_rule="noise-floor", rank_ratio=0.25, overrides=overrides)  # type: ignore[arg-type]
    pome.edit("org/base", "org/ft", tmp_path / "out", spec, card=True)
    text = read_card(tmp_path / "out").text
    monkeypatch.chdir(tmp_path)
    Path("edit.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("pome edit")))[1:]
    command[command.index("OUT")] = "again"
    assert command[-2:] == ["--config", "edit.yaml"]
    assert run_command([*command, "--quiet"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_the_card_of_a_sweeps_best_says_how_it_was_chosen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    scorer = pome.make_scorer(score_cmd="cksum < {model}/model.safetensors")
    grid = pome.make_grid({"beta": [1.0, 2.0]})
    pome.sweep("org/base", "org/ft", tmp_path / "out", grid, scorer, write_best=True, card=True)
    text = read_card(tmp_path / "out").text
    assert "the options are the best of 2 by their scores" in text and "No data and no training" not in text
    assert pome.verify(tmp_path / "out").ok


RECORD = TensorRecord(
    "t", None, "f", "up", (4, 2), "F32", "equalize", 2, 1, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.8, 0.6,
    None, None, 0.0, 1.0, 0.0, 0.0, "gram64", (), ((1, 1.0), (2, 0.5)),
)  # fmt: skip


def describe(revision: str | None = None) -> Manifest:
    side = SideRecord("org/ft" if revision else "/home/me/ft", revision, {})
    spec = EditSpec().to_mapping()
    base = SideRecord("/home/me/base", None, {})
    return Manifest(1, "0.1.0", "now", base, side, spec, (RECORD,), (), (), {}, files={})


@pytest.mark.parametrize(
    "broken",
    ["", "no metadata", "---\n[1, 2]\n---\nbody", "---\na: [\n---\nbody", "---\ntags: 3\n---\n", "---\n---\nbody",
     "---\nmodel-index: 5\nlicense: mit\n---\nbody", "---\n1: 2\n---\nbody", "---\nbody",
     "---\ntags: &a [*a]\n---\nbody", "---\ntags: " + "[" * 3000 + "\n---\nbody",
     "---\nlicense:\n  - &x0 [a]\n"
     + "".join(f"  - &x{i} [{','.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 13)) + "---\nbody",
     "\ufeff---\r\nlicense: mit\r\n---\r\nbody"],
)  # fmt: skip
def test_any_card_of_ft_gives_a_card(broken: str) -> None:
    card: Any = ModelCard(make_card(describe(), broken))
    assert card.data.tags == ["pome", "model-editing"]
    assert card.data.license == ("mit" if "mit" in broken else None)
    assert ("## Card of the fine-tuned model" in card.text) == ("body" in broken or "no metadata" in broken)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "equalized by POME ([arXiv 2510.06627](https://arxiv.org/abs/2510.06627)): the leading singular "
             "directions of each update are kept and given one weight."),
        ({"power": 1.0}, "are kept and weighted by their singular values to the power 1."),
        ({"overrides": ({"match": "a", "power": 0.5},)}, "by their singular values to the power 0 or 0.5."),
    ],
)  # fmt: skip
def test_the_card_says_what_became_of_the_singular_values(options: dict[str, Any], said: str) -> None:
    manifest = dataclasses.replace(describe(), spec=EditSpec(**options).to_mapping())
    assert said in make_card(manifest, "")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("org/llama", ["org/llama"]), (["gpt2", "/x/y"], ["gpt2"]), ("./x", None), ("a/b/c", None), (3, None)],
)
def test_base_model_of_fts_card_is_kept_where_it_is_a_hub_id(given: Any, kept: Any) -> None:
    card: Any = ModelCard(make_card(describe(), f"---\nbase_model: {given}\n---\n"))
    assert card.data.base_model == kept
    assert make_card(describe("c0"), f"---\nbase_model: {given}\n---\n").startswith("---\nbase_model:\n- org/ft\n")


names = st.text("abcxyz01_.-", min_size=1, max_size=8).filter(lambda name: name.strip("."))


shapes = st.sampled_from(["{}", "`{}`", "[{0}]({0})", '"{}"', "in {}, and", "({})"])


@given(st.lists(names, min_size=2, max_size=5), shapes)
def test_no_absolute_path_survives_in_a_local_card(parts: list[str], shape: str) -> None:
    path = "/" + "/".join(parts)
    text = make_card(describe(), f"---\nlicense: mit\n---\nbefore\n{shape.format(path)}\nafter")
    assert path not in text
    assert "before\n" in text and "\nafter" in text


def test_a_run_with_a_card_and_one_without_do_not_go_on_from_each_other(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    class Stop(pome.Progress):
        def finish(self, task: str) -> None:
            if task == "hash":  # the card is written by now
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pome.edit(*pair, tmp_path / "out", progress=Stop(), card=True)
    with pytest.raises(pome.OutputError, match="it differs in card"):
        pome.edit(*pair, tmp_path / "out")
    pome.edit(*pair, tmp_path / "out", fresh=True)
    assert (tmp_path / "out/README.md").read_text() == FT_CARD


def push(out: Path, *more: str) -> int:
    return run_command(["edit", "org/base", "org/ft", str(out), "--push-to-hub", "me/new", "--quiet", *more])


def test_a_push_makes_the_repository_and_what_is_there_is_the_output(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = tmp_path / "out"
    assert push(out) == 0
    repo = hub.repos["me/new"]
    assert not repo.private
    there = repo.commits[repo.head]
    assert {name: hashlib.sha256(content).hexdigest() for name, content in there.items()} == {
        **hash_tree(out),
        ".gitattributes": hashlib.sha256(there[".gitattributes"]).hexdigest(),
    }
    assert b"base_model:\n- org/ft\n" in there["README.md"]
    assert repo.messages == ["Upload an output of pome"]
    # As someone else gets it: from the Hub, held to BASE and FT there.
    assert pome.verify("me/new", "org/base", "org/ft", full=True).ok


def test_a_private_push_and_a_second_one(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(tmp_path / "out", "--private") == 0
    assert hub.repos["me/new"].private
    assert push(tmp_path / "out", "--overwrite", "--beta", "2") == 0
    repo = hub.repos["me/new"]
    assert repo.private  # what exists keeps what it is
    assert repo.commits[repo.head]["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_push_without_a_token_is_refused_before_any_work(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert push(tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: me/new: you are not logged in; log in with `hf auth login` or set HF_TOKEN"
    ]
    assert hub.count("safetensors|storage") == 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(tmp_path / "out") == 1
    assert "me/new: the Hub does not know the token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("*staging")) == []


ROUTES = ["POST /api/repos/create", "preupload", "objects/batch", "PUT /storage", "commit/main"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("passing", [True, False])
def test_an_upload_that_fails_leaves_the_output_and_says_how_to_go_on(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    passing: bool,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail(route, status=503 if passing else 403, times=1 if passing else 10**6)
    out = tmp_path / "the out"
    status = push(out)
    said = capsys.readouterr().err.splitlines()
    assert pome.verify(out).ok
    if passing:
        assert (status, said) == (0, [])
        assert "pome_manifest.json" in hub.repos["me/new"].commits[hub.repos["me/new"].head]
    else:
        assert status == 1
        assert said == [
            "error: me/new: the Hub answered 403; check what your token allows on its settings page; "
            f"{out} is complete, upload it with `hf upload me/new '{out}' . --create-pr` and merge that when whole"
        ]


def test_many_files_are_one_commit(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the Hub's library puts into one commit when it uploads a folder."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for i in range(300):
        path = tmp_path / f"out/part-{i % 3}/{i}.{'txt' if i % 2 else 'safetensors'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % i)
    (tmp_path / "out/.git").mkdir()
    (tmp_path / "out/.git/config").write_text("mine")
    push_output(tmp_path / "out", "me/new")
    repo = hub.repos["me/new"]
    assert len(repo.messages) == 1
    assert len(repo.commits[repo.head]) == 301  # and .gitattributes


@pytest.mark.parametrize("how", ["refused", "interrupted"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_an_upload_that_dies_between_its_parts_shows_readers_nothing_of_it(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    part: int,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    llama_pair(tmp_path / "sharded", shards=3)
    folders = [tmp_path / "sharded/base", tmp_path / "sharded/ft"]
    old, new = tmp_path / "old", tmp_path / "new"
    pome.edit(*folders, old)
    pome.edit(*folders, new, EditSpec(beta=2.0, layers=("ffn",)))
    push_output(old, "me/new")
    repo = hub.repos["me/new"]
    before = repo.head
    shards = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(new.glob("*.safetensors"))]
    line = f"PUT /storage/{shards[part]}"
    if how == "refused":
        hub.fail(line, status=403, times=10**6)
        with pytest.raises(HubError, match="is complete, upload it with"):
            push_output(new, "me/new")
        hub.faults.clear()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(hub, "take_fault", interrupt(line, hub.take_fault))
            with pytest.raises(HubError):
                push_output(new, "me/new")
    assert repo.head == before
    push_output(new, "me/new")
    assert len(repo.commits) == 3  # the repository itself, and an upload each
    assert repo.commits[repo.head]["pome_manifest.json"] == (new / "pome_manifest.json").read_bytes()
    for path in new.glob("*.safetensors"):
        assert repo.commits[repo.head][path.name] == path.read_bytes()


def interrupt(line: str, real: Callable[[str], Fault | None]) -> Callable[[str], Fault | None]:
    """A server that closes the connection of one request, every time."""

    def take(asked: str) -> Fault | None:
        if asked == line:
            raise ConnectionError("the client died")
        return real(asked)

    return take


def test_a_batch_publishes_and_a_finished_job_is_uploaded_again(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file = tmp_path / "jobs.yaml"
    job = f"{{base: org/base, fine_tuned: org/ft, out: {tmp_path}/out, push_to_hub: me/new, private: true}}"
    file.write_text(f"jobs:\n  - {job}\n")
    hub.fail("POST /api/repos/create", status=403)
    assert run_command(["batch", str(file), "--quiet"]) == 1
    assert "me/new" not in hub.repos
    assert run_command(["batch", str(file), "--quiet"]) == 0
    repo = hub.repos["me/new"]
    assert repo.private
    assert b"model-editing" in repo.commits[repo.head]["README.md"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"push_to_hub": "new"}, "push_to_hub: 'new' is not a repository; give ORG/NAME"),
        ({"push_to_hub": "me/new@main"}, "give ORG/NAME"),
        ({"push_to_hub": 3}, "give ORG/NAME"),
        ({"private": True}, "private: says what an upload becomes"),
    ],
)
def test_publication_options_at_odds_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Publication(**options)
    file = tmp_path / "jobs.yaml"
    keys = "".join(f", {key}: {str(value).lower()}" for key, value in options.items())
    file.write_text(f"jobs:\n  - {{base: b, fine_tuned: f, out: o{keys}}}\n")
    with pytest.raises(SpecError, match="jobs.yaml:2: "):
        read_batch(file)
    assert dataclasses.asdict(Publication()) == {"card": False, "push_to_hub": None, "private": False}
