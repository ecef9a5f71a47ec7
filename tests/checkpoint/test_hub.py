"""Checkpoints from the Hub, over real sockets: what is asked for, what is not, and what every failure says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pome
from pome import Manifest
from pome.checkpoint import hub_calls
from pome.checkpoint.sidefiles import list_side_files
from pome.checkpoint.source import open_checkpoint
from pome.cli.app import run_command
from support.checkpoints import (
    LLAMA,
    assert_only_edited,
    environment,
    perturb,
    random_llama,
    read_manifest,
    read_ranges,
    read_tensors,
    write_checkpoint,
)
from support.hub_server import TOKEN, HubServer

HERE = "no such file or folder here, and as a Hub id:"


def write_pair(folder: Path, layers: int = 2) -> tuple[Path, Path]:
    """BASE in three shards, FT in one file, with what a training job leaves beside it."""
    base = random_llama(layers)
    ft = write_checkpoint(folder / "ft", perturb(base), config=LLAMA)
    (ft / "README.md").write_text("---\nlicense: mit\n---\n# Tuned\n")
    (ft / "sub").mkdir()
    (ft / "sub/notes.txt").write_text("kept")
    return write_checkpoint(folder / "base", base, shards=3, config=LLAMA), ft


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    base, ft = write_pair(tmp_path)
    hub.add("org/base", base)
    hub.add("org/ft", ft)
    return base, ft


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and what stderr says of errors, asserted to be one line without a traceback."""
    capsys.readouterr()
    status = run_command([*map(str, arguments), "--quiet"])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    errors = printed.err.splitlines()
    assert len(errors) == (status != 0), errors
    return status, printed.err.strip()


def test_an_edit_of_hub_ids_is_the_edit_of_their_folders(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, ft = pair
    manifest = pome.edit("org/base", "org/ft", tmp_path / "out")
    local = pome.edit(base, ft, tmp_path / "local")
    assert_only_edited(ft, tmp_path / "out", [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)])
    assert manifest.files == local.files
    assert manifest.base.revision == hub.repos["org/base"].head
    assert manifest.fine_tuned.revision == hub.repos["org/ft"].head
    # The hashes of BASE's files come from the listing: they are those of the files, though no file was read whole.
    for name, record in manifest.base.files.items():
        assert record == local.base.files[name]
    assert len(manifest.base.files) == 3
    assert manifest.fine_tuned.files == local.fine_tuned.files


def test_a_revision_is_resolved_and_an_older_commit_is_edited(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    first = hub.repos["org/ft"].head
    newer = {**hub.repos["org/ft"].commits[first], "extra.txt": b"newer"}
    second = hub.commit("org/ft", newer)
    assert pome.edit("org/base", "org/ft", tmp_path / "new").fine_tuned.revision == second
    assert (tmp_path / "new/extra.txt").read_bytes() == b"newer"
    assert pome.edit("org/base@main", f"org/ft@{first}", tmp_path / "old").fine_tuned.revision == first
    assert not (tmp_path / "old/extra.txt").exists()


def test_of_base_no_more_than_headers_and_needed_ranges_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}
    base = {
        f"model.layers.{i}.mlp.{name}.weight": torch.randn(shape) for i in range(3) for name, shape in shapes.items()
    }
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
    folder = write_checkpoint(tmp_path / "base", base, shards=2, config=config)
    hub.add("org/base", folder)
    ft = write_checkpoint(tmp_path / "ft", perturb(base), config=config)
    hub.add("org/ft", ft)
    assert run_command(["edit", "org/base", "org/ft", str(tmp_path / "out"), "--layers", "up", "--quiet"]) == 0
    sent = needed = whole = 0
    for file in sorted(folder.glob("*.safetensors")):
        ranges = read_ranges(file)
        headers = min(start for start, _ in ranges.values())
        needed += headers + sum(end - start for name, (start, end) in ranges.items() if "up_proj" in name)
        whole += file.stat().st_size
        sent += hub.sum_sent(file.read_bytes())
    # Of at most eight matrices the first rows are read before, to see whether BASE is the right model.
    sampled = 8 * 4 * 2**14
    assert needed <= sent <= 1.02 * needed + sampled < 0.6 * whole
    # Of FT every byte, once (and its header a second time, for the plan that is shown before anything is fetched).
    size = (ft / "model.safetensors").stat().st_size
    assert size <= hub.sum_sent((ft / "model.safetensors").read_bytes()) <= 1.02 * size
    print(f"BASE: {sent} bytes sent, {needed} needed, {whole} in all")


def test_a_dry_run_downloads_no_tensor_data(
    hub: HubServer, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, ft = pair
    assert run_command(["edit", "org/base", "org/ft", "out", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["edit"]) == 2
    for file in (*base.glob("*.safetensors"), *ft.glob("*.safetensors")):
        headers = min(start for start, _ in read_ranges(file).values())
        assert 0 < hub.sum_sent(file.read_bytes()) <= headers
    assert not Path("out").exists()


def test_a_cached_base_is_not_asked_for_again(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/base")
    snapshot_download("org/ft")
    hub.seen.clear()
    manifest = pome.edit("org/base", "org/ft", tmp_path / "out")
    assert hub.count("storage|resolve.*safetensors") == 0
    assert manifest.base.revision == hub.repos["org/base"].head
    assert len(manifest.base.files) == 3


def test_offline_works_from_the_cache_and_asks_for_nothing(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    snapshot_download("org/base")
    online = pome.edit("org/base", "org/ft", tmp_path / "online")
    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = pome.edit("org/base", "org/ft", tmp_path / "offline")
    assert hub.seen == []
    assert offline.fine_tuned == online.fine_tuned
    assert read_manifest(tmp_path / "offline") == read_manifest(tmp_path / "online")


def test_offline_without_a_cache_says_so(
    hub: HubServer, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, said = run(capsys, "edit", "org/base", "org/ft", "out")
    assert (status, hub.seen) == (1, [])
    assert said.replace("org/ft", "org/base") == (
        f"error: org/base: {HERE} not (wholly) in the local cache, and the Hub is switched off; unset "
        "HF_HUB_OFFLINE, or give a folder"
    )


def test_a_private_repository_needs_the_token(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("org/base", "org/ft"):
        hub.repos[name].private = True
    status, said = run(capsys, "edit", "org/base", "org/ft", tmp_path / "out")
    assert status == 1
    wanted = "error: org/base: neither a local file or folder nor a repository that the Hub shows you"
    assert said.replace("/ft", "/base").startswith(wanted)
    assert "`hf auth login` if it is private" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.seen.clear()
    pome.edit("org/base", "org/ft", tmp_path / "out")
    # The token is for the Hub alone; the storage to which it redirects is another host.
    assert {seen.token for seen in hub.seen if seen.path.startswith("/storage")} == {None}
    assert {seen.token for seen in hub.seen if not seen.path.startswith("/storage")} == {TOKEN}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, said = run(capsys, "edit", "org/base", "org/ft", tmp_path / "out2")
    assert status == 1
    wanted = f"error: org/base: {HERE} the Hub does not know the token; log in again with `hf auth login`, or"
    assert said.replace("/ft", "/base").startswith(wanted)


def test_a_gated_repository_names_what_to_do(
    hub: HubServer, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["org/base"].gated = True
    status, said = run(capsys, "edit", "org/base", "org/ft", "out")
    assert status == 1
    assert "gated; accept its terms on its page, then log in with `hf auth login`" in said
    hub.repos["org/base"].gated, hub.repos["org/ft"].gated = False, True
    status, said = run(capsys, "edit", "org/base", "org/ft", "out")
    assert status == 1
    assert "org/ft" in said and "gated" in said


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("models/ft", "models/ft: neither a local file or folder nor a repository that the Hub shows you;"),
        ("org/base@v9", "as a Hub id: the repository has no such revision; check what stands after the @"),
        ("org/base@0123456789012345678901234567890123456789", "the repository has no such revision"),
        ("a/b/c", "a/b/c: no such file or folder; give a folder with .safetensors files"),
        ("org/base--x..y", "check the name"),
    ],
)
def test_a_name_that_is_neither_a_folder_nor_a_repository_says_both(
    hub: HubServer, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], base: str, said: str
) -> None:
    for arguments in ((base, "org/ft"), ("org/base", base)):
        status, message = run(capsys, "edit", *arguments, "out")
        assert status == 1
        assert said in message


# A request of each kind, and what may happen to it in passing: the outcome is that of an undisturbed run.
KINDS = {
    "listing": "GET /api/models/org/base$",
    "info of FT": "GET /api/models/org/ft",
    "small file": "(HEAD|GET) /org/base/resolve/.*config.json",
    "resolve": "GET /org/base/resolve/.*-00001",
    "storage": "GET /storage/",
    "head of FT": "HEAD /org/ft/resolve/.*safetensors",
    "file of FT": "GET /org/ft/resolve/.*notes",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 500, "times": 2}, {"status": 429, "headers": {"Retry-After": "0"}}, {"cut": 7}],
    ids=["503", "500 twice", "429", "cut"],
)
def test_passing_failures_are_retried(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, kind: str, fault: dict[str, Any]
) -> None:
    _, ft = pair
    hub.fail(KINDS[kind], **fault)
    manifest = pome.edit("org/base", "org/ft", tmp_path / "out")
    assert hub.faults[0].times == 0
    assert len(manifest.tensors) == 2
    assert_only_edited(ft, tmp_path / "out", [record.name for record in manifest.tensors])


def test_a_connection_that_is_cut_again_and_again_still_gives_the_bytes(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, ft = pair
    hub.fail("GET /storage/", cut=900, times=12)
    manifest = pome.edit("org/base", ft, tmp_path / "out")
    assert hub.faults[0].times == 0
    assert manifest.files == pome.edit(base, ft, tmp_path / "local").files


def test_a_signed_address_is_used_again_until_it_expires(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with_names = open_checkpoint("org/base")
    hub.seen.clear()
    names = [name for name, (file, _) in with_names.tensors.items() if file.startswith("model-00001")]
    expected = read_tensors(pair[0])

    def check(name: str) -> None:
        entry = with_names.tensors[name][1]
        data = with_names.read(name, entry.start, entry.nbytes)
        assert bytes(data) == expected[name].numpy().tobytes()

    check(names[0])
    check(names[1])
    assert hub.count("GET /org/base/resolve") == 0  # the headers were read through it before
    hub.fail("GET /storage", status=403)
    check(names[0])
    assert [seen.status for seen in hub.seen[-3:]] == [403, 302, 206]
    # A server that is gone: the Hub knows where the file lies now.
    file: Any = with_names.files[with_names.tensors[names[1]][0]].file
    file._storage = "http://127.0.0.1:9/storage/gone"
    check(names[1])
    assert [seen.status for seen in hub.seen[-2:]] == [302, 206]
    with_names.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"pattern": "GET /api/models/org/base", "status": 503}, "the Hub answered 503; try again later"),
        ({"pattern": "GET /api/models/org/base", "status": 403}, "the Hub answered 403; check what your token allows"),
        ({"pattern": "GET /api/models/org/base", "cut": 0}, "cannot reach the Hub"),
        ({"pattern": "GET /api/models/org/base", "body": b"<html>log in to the wifi"}, "not what the Hub knows"),
        ({"pattern": "GET /api/models/org/base", "body": b"{}"}, "not what the Hub knows"),
        ({"pattern": "GET /api/models/org/ft", "body": b"[]"}, "not what the Hub knows"),
        ({"pattern": "GET /api/models/org/ft", "body": b'{"id": "org/ft"}'}, "not what the Hub knows"),
        ({"pattern": "GET /api/models/org/ft", "body": b'{"id": "org/ft", "siblings": [1]}'}, "not what the Hub knows"),
        ({"pattern": "/org/base/resolve/.*json", "status": 500}, "the Hub answered 500; try again later"),
        ({"pattern": "GET /storage", "status": 500}, "the Hub answered 500; try again later"),
        ({"pattern": "GET /storage", "status": 404}, "the Hub answered 404; try again later"),
        ({"pattern": "GET /storage", "cut": 0}, "cannot reach the Hub"),
        ({"pattern": "GET /storage", "no_ranges": True}, "answered 200 (the whole file) to a request for bytes from 0"),
        ({"pattern": "HEAD /org/ft/resolve", "status": 500}, "config.json: the Hub answered 500; try again later"),
        ({"pattern": "GET /api/models/org/ft", "status": 500}, "as a Hub id: the Hub answered 500; try again later"),
    ],
)  # fmt: skip
def test_lasting_failures_end_in_a_message_of_one_line(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
    said: str,
) -> None:
    hub.fail(**{"times": 10**6, **fault})
    status, message = run(capsys, "edit", "org/base", "org/ft", tmp_path / "out")
    assert status == 1
    assert said in message
    assert not (tmp_path / "out").exists()
    assert hub.faults[0].times > 10**6 - 100  # bounded


def test_an_incomplete_cache_is_not_taken_for_the_repository(
    hub: HubServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The library answers with an older commit, or a part of this one, when the Hub fails while it asks."""
    import huggingface_hub

    fetch = huggingface_hub.snapshot_download
    old = fetch("org/ft")
    (pair[1] / "tokenizer.json").write_text("newer")
    hub.add("org/ft", pair[1])
    part = Path(huggingface_hub.hf_hub_download("org/ft", "model.safetensors")).parent
    hub.fail("GET /api/models/org/ft", status=503, times=10**6)
    status, said = run(capsys, "edit", "org/base", "org/ft", tmp_path / "out")
    assert (status, said) == (
        1,
        f"error: org/ft: {HERE} the Hub answered 503; try again later",
    )
    hub.faults.clear()
    for given, absent in ((str(part), "README.md"), (old, hub.repos["org/ft"].head)):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, given=given, **__: given)
        status, said = run(capsys, "edit", "org/base", "org/ft", tmp_path / "out")
        assert (status, said) == (
            1,
            f"error: org/ft: {HERE} cannot reach the Hub ({absent} did not come); check the network",
        )
    answers = iter([old, str(part)])
    later = lambda *given, **named: next(answers, None) or fetch(*given, **named)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", later)
    assert pome.edit("org/base", "org/ft", tmp_path / "out").fine_tuned.revision == hub.repos["org/ft"].head
    assert (tmp_path / "out/tokenizer.json").read_text() == "newer"


def test_a_server_that_is_not_there(
    hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, said = run(capsys, "edit", "org/base", "org/ft", "out")
    assert status == 1
    first = f"error: org/base: {HERE} cannot reach the Hub ("
    assert said.replace("/ft", "/base").startswith(first)
    assert said.endswith("; check the network")


def test_a_mistyped_path_is_not_asked_for_again_and_again_without_a_network(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    waited: list[float] = []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_calls.time, "sleep", waited.append)
    monkeypatch.setattr(hub_calls, "WAITS", (1.0, 2.0, 4.0, 8.0))
    for whole in (False, True):
        with pytest.raises(pome.CheckpointError, match="^runs/ft: no such file or folder here"):
            open_checkpoint("runs/ft", whole=whole)
    assert waited == [1.0, 1.0]


def test_of_ft_all_is_fetched_but_other_formats_and_training_state(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, ft = write_pair(tmp_path)
    hub.add("org/base", base)
    others = ["pytorch_model.bin", "original/consolidated.00.pth", "checkpoint-500/model.safetensors", "tf_model.h5"]
    others += ["model.gguf", "onnx/model.onnx", "flax_model.msgpack", "runs/checkpoint-5/rng_state.pth"]
    others += ["global_step7/x.txt", "model.tflite", "rust_model.ot", "1_Dense/pytorch_model.bin"]
    # Weights that no safetensors stands beside, in a part of the model with a config of its own, are no copy.
    parts = ["2_Dense/config.json", "2_Dense/pytorch_model.bin", "mel_filters.npz"]
    parts += ["1_Dense/config.json", "1_Dense/model.safetensors", "a[b]*/c?.txt"]
    for name in others + parts:
        (ft / name).parent.mkdir(parents=True, exist_ok=True)
        (ft / name).write_bytes(b"other")
    hub.add("org/ft", ft)
    manifest = pome.edit("org/base", "org/ft", tmp_path / "out")
    asked = {seen.path.partition("/resolve/")[2].partition("/")[2] for seen in hub.seen}
    assert set(parts) <= asked
    for name in others:
        assert name not in asked
        assert manifest.not_copied[name].endswith("; not downloaded")
    assert {"sub/notes.txt", *parts} <= manifest.files.keys()
    # The rule here and the rule for folders on disk leave out the same files.
    local = open_checkpoint(ft)
    copied, _ = list_side_files(local)
    local.close()
    assert {file.name for file in copied} | {"model.safetensors"} == set(manifest.files)


def test_a_repository_of_pickled_weights_says_how_to_convert(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"x")
    hub.add("org/old", tmp_path / "old")
    for whole in (False, True):
        with pytest.raises(pome.CheckpointError, match="never unpickled; convert them once"):
            open_checkpoint("org/old", whole=whole)
    assert hub.count("pytorch_model.bin") == 0


def test_an_interrupted_run_goes_on_although_base_was_cached_meanwhile(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    # Headers are read through one address; the first tensor of the second layer is asked for when units are worked on.
    class Stop(pome.Progress):
        def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
            if task == "edit" and amount:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of 2 units are safe"):
        pome.edit("org/base", "org/ft", tmp_path / "out", progress=Stop())
    snapshot_download("org/base")
    hub.seen.clear()
    manifest = pome.edit("org/base", "org/ft", tmp_path / "out")
    assert hub.count("GET /storage") == 0
    assert manifest.files == pome.edit(*pair, tmp_path / "local").files


def test_verify_takes_hub_ids(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    pome.edit("org/base", "org/ft", tmp_path / "out")
    hub.add("org/out", tmp_path / "out")
    verdict = pome.verify("org/out", "org/base", "org/ft", full=True)
    assert verdict.ok, verdict
    assert verdict.edits == 2
    assert verdict.bytes_compared > 0


CHILD = """
import sys
from pome.cli.app import run_command
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_environment_alone_is_enough(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As a user runs it: a process of its own, HF_ENDPOINT, HF_TOKEN and HF_HOME, then HF_HUB_OFFLINE."""
    hub.repos["org/ft"].private = True
    env = {**environment(), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env["HF_TOKEN"] = TOKEN
    hub.fail("GET /storage", cut=100)

    def start(out: str, **more: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", CHILD, "edit", "org/base", "org/ft", str(tmp_path / out), "--quiet"]
        return subprocess.run(arguments, env={**env, **more}, capture_output=True, text=True, timeout=120)

    done = start("out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Manifest.from_json((tmp_path / "out/pome_manifest.json").read_bytes(), "out").base.revision
    seen = len(hub.seen)
    done = start("out2", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.replace("org/ft", "org/base").startswith(
        f"error: org/base: {HERE} not (wholly) in the local cache"
    )
    assert len(hub.seen) == seen
    hub.repos["org/ft"].private = False
    done = start("out3", HF_TOKEN="")
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(tmp_path / "out3/model.safetensors").keys() == load_file(tmp_path / "out/model.safetensors").keys()
