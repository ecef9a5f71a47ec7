"""OUT appears whole or not at all: clone, patch, journal, publish, overwrite, resume; every byte not edited is FT's."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pome.output.commits
from pome import CheckpointError, EditSpec, OutputError, edit
from pome.kernel.equalize import equalize_matrix
from pome.output import clone
from pome.output.staging import Staging
from pome.output.target import check_target
from support.checkpoints import (
    INDEX,
    LLAMA,
    assert_only_edited,
    hash_tree,
    llama_pair,
    perturb,
    random_llama,
    read_manifest,
    read_tensors,
    write_checkpoint,
)

UP = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
STAGING = "out.pome-staging"


def bert(prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {f"encoder.layer.{i}.intermediate.dense.weight": (40, 16) for i in range(2)}
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("ft_shards", [1, 3])
@pytest.mark.parametrize("base_shards", [1, 2])
def test_every_byte_outside_the_edited_ranges_is_fts(tmp_path: Path, base_shards: int, ft_shards: int) -> None:
    base = write_checkpoint(tmp_path / "base", random_llama(), shards=base_shards, config=LLAMA)
    ft = write_checkpoint(tmp_path / "ft", perturb(random_llama()), shards=ft_shards, config=LLAMA)
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)
    assert (tmp_path / "out" / INDEX).exists() == (ft_shards > 1)


def test_another_dtype_and_sharding_and_prefix_and_extra_heads_of_base(tmp_path: Path) -> None:
    base = {name: t.half() for name, t in bert("bert.").items()} | {"cls.predictions.decoder.weight": torch.ones(9, 16)}
    ft = perturb(bert("")) | {"classifier.weight": torch.ones(3, 16)}
    write_checkpoint(tmp_path / "base", base, shards=3)
    write_checkpoint(tmp_path / "ft", ft, shards=2)
    spec = EditSpec(layers=("up", "head"), allow_missing=True)
    manifest = edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", spec)
    assert_only_edited(tmp_path / "ft", tmp_path / "out", bert(""))
    assert [(kept.name, kept.reason) for kept in manifest.kept] == [("classifier.weight", "BASE has no such tensor")]


def test_lone_files_give_a_folder_with_the_name_of_fts_file(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    (ft / "model.safetensors").rename(ft / "weights.safetensors")
    manifest = edit(base / "model.safetensors", ft / "weights.safetensors", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights.safetensors", "pome_manifest.json"}
    assert_only_edited(ft, tmp_path / "out", UP, also=["config.json"])
    assert manifest.files.keys() == {"weights.safetensors"}


def test_side_files_are_copied_and_training_state_is_left_out(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    for name in ("tokenizer.json", "code/model.py", "original/params.json", "merges.txt", "chat_template.jinja"):
        (ft / name).parent.mkdir(exist_ok=True)
        (ft / name).write_text(f"this is {name}")
    (ft / "code/model.py").chmod(0o755)
    (tmp_path / "vocabulary").write_text("words")
    (ft / "vocab.txt").symlink_to(tmp_path / "vocabulary")
    left = {
        "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
        "pytorch_model.bin", "model.onnx", "extra.safetensors", "pome_manifest.json",
    }  # fmt: skip
    for name in left:
        (ft / name).write_bytes(b"no")
    for folder in ("checkpoint-500", "global_step12", ".git"):
        (ft / folder).mkdir()
        (ft / folder / "config.json").write_text("{}")
    inside = {f"{folder}/config.json" for folder in ("checkpoint-500", "global_step12", ".git")}
    manifest = edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP, also=left | inside)
    assert manifest.not_copied.keys() == left | {"checkpoint-500/", "global_step12/", ".git/"}
    assert all(manifest.not_copied.values())
    assert stat.S_IMODE((tmp_path / "out/code/model.py").stat().st_mode) == 0o755
    assert not (tmp_path / "out/vocab.txt").is_symlink()


def test_the_manifest_hashes_every_file_as_it_lies_there(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    edit(base, ft, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")

    def measure(folder: Path, skip: str = "") -> dict[str, dict[str, Any]]:
        return {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in folder.iterdir()
            if path.name != skip
        }

    assert manifest["files"] == measure(tmp_path / "out", "pome_manifest.json")
    for key, folder in (("base", base), ("fine_tuned", ft)):
        assert manifest[key] == {"source": str(folder), "revision": None, "files": measure(folder)}
    assert manifest["spec"] == EditSpec().to_mapping()
    assert (manifest["format_version"], manifest["pome_version"]) == (1, pome.__version__)


def refuse(tmp_path: Path, out: Path, **options: Any) -> str:
    """The message with which OUT is refused; nothing anywhere below tmp_path changed."""
    before = hash_tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        edit(tmp_path / "base", tmp_path / "ft", out, **options)
    assert hash_tree(tmp_path) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unusable_out_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ft = llama_pair(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/precious").write_text("keep me")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "alias").symlink_to(ft)
    assert "OUT lies inside" in refuse(tmp_path, ft / "out")
    assert f"OUT is {ft};" in refuse(tmp_path, ft)
    assert "OUT lies inside" in refuse(tmp_path, tmp_path / "base/deep/out", overwrite=True)
    assert "OUT lies inside" in refuse(tmp_path, tmp_path / "alias/out")
    assert "OUT holds" in refuse(tmp_path, tmp_path, overwrite=True)
    assert "exists; choose another OUT or give overwrite" in refuse(tmp_path, tmp_path / "there")
    assert "exists" in refuse(tmp_path, tmp_path / "file")
    assert "no folder of its own" in refuse(tmp_path, tmp_path / "file", overwrite=True)
    assert "is a symbolic link" in refuse(tmp_path, tmp_path / "link", overwrite=True)
    assert "OUT is a folder" in refuse(tmp_path, tmp_path / "out.safetensors")
    assert "Not a directory" in refuse(tmp_path, tmp_path / "file/out")
    edit(tmp_path / "base", ft, tmp_path / "made")
    assert "OUT lies inside the output" in refuse(tmp_path, tmp_path / "made/inner")
    (tmp_path / "there/below").mkdir()
    for folder in ("there", "there/below"):
        monkeypatch.chdir(tmp_path / folder)
        assert "the working folder or above it" in refuse(tmp_path, tmp_path / "there", overwrite=True)


def fail_with(code: int, when: Callable[..., bool], real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but an OSError of that code for the calls that `when` picks."""

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_target_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The system's answer is made here: to root, who runs tests in containers, no folder is read-only."""
    llama_pair(tmp_path)
    monkeypatch.setattr(os, "mkdir", fail_with(code, lambda path, *_: STAGING in str(path), os.mkdir))
    message = refuse(tmp_path, tmp_path / "out")
    assert f"{STAGING}: {os.strerror(code)}" in message and "choose" in message


def test_a_disk_without_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_pair(tmp_path)
    real = pome.output.staging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pome.output.staging, "can_share", lambda *_: False)
    monkeypatch.setattr(pome.output.staging.shutil, "disk_usage", lambda _: real._replace(free=1000))
    assert "are needed and 1.0 kB are free there; make room" in refuse(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite", "fsync", "write"])
def test_a_disk_that_fills_up_leaves_no_out_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    inputs = hash_tree(base), hash_tree(ft)
    edit(base, ft, tmp_path / "undisturbed")
    calls = iter(range(1000))
    if call == "copy_file_range" and not hasattr(os, call):
        monkeypatch.setattr(os, call, None, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(clone, "share_file", lambda *_: False)
        patch.setattr(os, call, fail_with(errno.ENOSPC, lambda *_: next(calls) >= 2, getattr(os, call)))
        with pytest.raises(OutputError, match="No space left on device; make room there, then run the same command"):
            edit(base, ft, tmp_path / "out")
    assert (hash_tree(base), hash_tree(ft)) == inputs
    assert not (tmp_path / "out").exists()
    edit(base, ft, tmp_path / "out")
    assert_same_output(tmp_path / "out", tmp_path / "undisturbed")
    assert not (tmp_path / STAGING).exists()


def assert_same_output(one: Path, two: Path) -> None:
    assert read_manifest(one) == read_manifest(two)
    hashes = [hash_tree(folder) for folder in (one, two)]
    for tree in hashes:
        tree.pop("pome_manifest.json")
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("way", ["share", "in_kernel", "read_and_write"])
def test_every_way_to_copy_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    base, ft = llama_pair(tmp_path)
    if way != "share":
        monkeypatch.setattr(clone, "share_file", lambda *_: False)
    if way == "read_and_write":
        monkeypatch.setattr(clone, "_CHUNK", 1000)
        if hasattr(os, "copy_file_range"):
            monkeypatch.setattr(os, "copy_file_range", fail_with(errno.EXDEV, lambda *_: True, os.copy_file_range))
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)


COPY_REFUSALS = (errno.EIO, errno.EACCES, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@pytest.mark.parametrize("call", ["copy_file_range", "ioctl"])
@pytest.mark.parametrize("code", COPY_REFUSALS)
def test_a_refused_way_of_copying_is_followed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    base, ft = llama_pair(tmp_path)
    if call == "ioctl":
        monkeypatch.setattr(fcntl, "ioctl", fail_with(code, lambda *_: True, fcntl.ioctl))
    else:
        monkeypatch.setattr(clone, "share_file", lambda *_: False)
        monkeypatch.setattr(os, call, fail_with(code, lambda *_: True, getattr(os, call)))
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)


def test_a_source_that_cannot_be_read_is_an_error_whatever_the_way_of_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ft = llama_pair(tmp_path)
    monkeypatch.setattr(clone, "share_file", lambda *_: False)
    for call in ("copy_file_range", "pread"):
        monkeypatch.setattr(os, call, fail_with(errno.EIO, lambda *_: True, getattr(os, call)))
    with pytest.raises(OutputError, match="Input/output error"):
        edit(base, ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copying_stops_at_once_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = llama_pair(tmp_path)
    monkeypatch.setattr(clone, "share_file", lambda *_: False)
    monkeypatch.setattr(os, "copy_file_range", fail_with(errno.ENOSPC, lambda *_: True, os.copy_file_range))
    with pytest.raises(OutputError, match="make room"):
        edit(base, ft, tmp_path / "out")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize(
    ("call", "said"), [("fchmod", "keeps no permissions"), ("fsync", "does not sync"), ("fdatasync", None)]
)
def test_a_request_that_the_file_system_does_not_have_is_a_notice_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, said: str | None, code: int
) -> None:
    base, ft = llama_pair(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_with(code, lambda *_: True, getattr(os, call)))
        manifest = edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)
    assert bool(manifest.notices) == bool(said)
    assert all(said in notice for notice in manifest.notices if said)


@pytest.mark.parametrize("how", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    base, ft = llama_pair(tmp_path)

    def is_folder(first: object, *rest: object) -> bool:
        if how == "open":
            return bool(rest) and isinstance(rest[0], int) and bool(rest[0] & os.O_DIRECTORY)
        return isinstance(first, int) and stat.S_ISDIR(os.fstat(first).st_mode)

    monkeypatch.setattr(os, how, fail_with(errno.EINVAL, is_folder, getattr(os, how)))
    manifest = edit(base, ft, tmp_path / "out")
    assert [notice.partition("the file system ")[2].partition(";")[0] for notice in manifest.notices] == [
        "does not sync folders"
    ]


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_a_sync_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    base, ft = llama_pair(tmp_path)
    monkeypatch.setattr(os, call, fail_with(errno.EIO, lambda *_: True, getattr(os, call)))
    with pytest.raises(OutputError, match="Input/output error"):
        edit(base, ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_short_reads_and_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = llama_pair(tmp_path)
    edit(base, ft, tmp_path / "undisturbed")
    pwrite, write, preadv = os.pwrite, os.write, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:99]], at))
    edit(base, ft, tmp_path / "out")
    assert_same_output(tmp_path / "out", tmp_path / "undisturbed")


@pytest.mark.parametrize("suffix", [".pome-staging", ".pome-sweep"])
def test_no_folder_of_somebody_else_is_taken_for_our_own(tmp_path: Path, suffix: str) -> None:
    """What lies in a staging folder is removed in the end, and so must be what pome put there."""
    base, ft = llama_pair(tmp_path)
    staging = tmp_path / f"out{suffix}"
    ft.rename(staging)
    with pytest.raises(OutputError, match="OUT holds"):
        edit(base, staging, tmp_path / "out")
    staging.mkdir(exist_ok=True)
    (staging / "output").mkdir()
    for file in list(staging.glob("*.*")):
        file.rename(staging / "output" / file.name)
    before = hash_tree(tmp_path)
    with pytest.raises(OutputError, match="OUT holds"):
        edit(base, staging / "output", tmp_path / "out")
    assert hash_tree(tmp_path) == before
    (staging / "output").rename(ft)
    (staging / "notes.txt").write_text("mine")
    assert "holds notes.txt, which pome did not put there" in refuse(tmp_path, tmp_path / "out")
    (staging / "notes.txt").unlink()
    staging.rmdir()
    staging.symlink_to(ft)
    assert "OUT holds" in refuse(tmp_path, tmp_path / "out")


def test_out_is_resolved_as_the_system_resolves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = llama_pair(tmp_path)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    edit(base, ft, tmp_path / "link/../out")
    assert_only_edited(ft, tmp_path / "far/out", UP)
    for out in (tmp_path / "far/away/..", "."):
        monkeypatch.chdir(tmp_path / "far/away")
        assert "exists" in refuse(tmp_path, Path(out))
    monkeypatch.chdir(tmp_path / "far")
    edit(base, ft, "~nobody-of-this-name/out")  # as a shell takes it
    assert_only_edited(ft, tmp_path / "far/~nobody-of-this-name/out", UP)


@pytest.mark.parametrize("what", ["weights", "config.json"])
def test_an_input_whose_files_are_links_into_out_keeps_them(tmp_path: Path, what: str) -> None:
    base, ft = llama_pair(tmp_path)
    edit(base, ft, tmp_path / "out")
    name = "model.safetensors" if what == "weights" else what
    (ft / name).unlink()
    (ft / name).symlink_to(tmp_path / "out" / name)
    assert "OUT holds" in refuse(tmp_path, tmp_path / "out", overwrite=True)


def former_output(folder: Path) -> None:
    folder.mkdir()
    (folder / "pome_manifest.json").write_text("{}")
    (folder / "old").write_text("old")


def test_overwrite_replaces_the_whole_and_leaves_no_litter(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    former_output(tmp_path / "out")
    edit(base, ft, tmp_path / "out", overwrite=True)
    assert_only_edited(ft, tmp_path / "out", UP)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft", "out"]


def test_an_overwrite_that_fails_keeps_the_former_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = llama_pair(tmp_path)
    former_output(tmp_path / "out")
    renames = iter(range(10))
    with monkeypatch.context() as patch:
        # The former OUT is moved aside by the first rename; the second, which brings the new one, fails.
        patch.setattr(os, "rename", fail_with(errno.EIO, lambda *_: next(renames) == 1, os.rename))
        with pytest.raises(OutputError):
            edit(base, ft, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/old").read_text() == "old"
    # As after a crash between the two renames: the next run puts the former OUT back before anything else.
    (tmp_path / "out").rename(tmp_path / STAGING / "replaced")
    with pytest.raises(OutputError, match="appeared meanwhile"):
        edit(base, ft, tmp_path / "out")
    assert (tmp_path / "out/old").read_text() == "old"
    edit(base, ft, tmp_path / "out", overwrite=True)
    assert_only_edited(ft, tmp_path / "out", UP)


def test_a_half_removed_former_out_is_not_restored(tmp_path: Path) -> None:
    """Killed amid the removal of the former OUT, and the new one moved away since: there is nothing to put back."""
    base, ft = llama_pair(tmp_path)
    former_output(tmp_path / STAGING)
    (tmp_path / STAGING).rename(tmp_path / "replaced")
    (tmp_path / STAGING).mkdir()
    (tmp_path / "replaced").rename(tmp_path / STAGING / "replaced")
    (tmp_path / STAGING / "publishing").write_text("{}")
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)


class Interrupted(Exception):
    """Stands for anything that ends a run in the middle."""


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the kernel fail after `count` matrices; the list that is returned grows with each it starts."""
    import pome.editing.unit

    started: list[str] = []

    def equalize(delta: torch.Tensor, *options: Any) -> Any:
        started.append("x")
        if len(started) > count:
            raise Interrupted
        return equalize_matrix(delta, *options)

    monkeypatch.setattr(pome.editing.unit, "equalize_matrix", equalize)
    return started


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    spec = EditSpec(layers=("ffn",))
    edit(base, ft, tmp_path / "undisturbed", spec)
    with monkeypatch.context() as patch:
        interrupt_after(done, patch)
        with pytest.raises(Interrupted):
            edit(base, ft, tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()
    started = interrupt_after(100, monkeypatch)
    edit(base, ft, tmp_path / "out", spec)
    assert len(started) == 6 - done
    assert_same_output(tmp_path / "out", tmp_path / "undisturbed")
    assert not (tmp_path / STAGING).exists()


def stop_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    base, ft = llama_pair(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(Interrupted):
            edit(base, ft, tmp_path / "out")
    return base, ft


def test_progress_of_another_command_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = stop_in_the_middle(tmp_path, monkeypatch)
    message = refuse(tmp_path, tmp_path / "out", spec=EditSpec(beta=2.0))
    assert "unfinished run of another command (it differs in beta)" in message and "give fresh" in message
    started = interrupt_after(100, monkeypatch)
    edit(base, ft, tmp_path / "out", EditSpec(beta=2.0), fresh=True)
    assert len(started) == 2
    assert read_manifest(tmp_path / "out")["spec"]["beta"] == 2.0


def test_an_input_that_changed_since_is_another_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = stop_in_the_middle(tmp_path, monkeypatch)
    info = (base / "model.safetensors").stat()
    os.utime(base / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns + 10**9))
    assert "it differs in base" in refuse(tmp_path, tmp_path / "out")


BESIDE = ["ft/config.json", "ft/tokenizer.json", "ft/model.safetensors.index.json", "base/config.json"]


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("when", ["between two runs", "within one"])
def test_a_file_beside_the_weights_that_changed_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    """Of its old and its new bytes OUT would hold some, and the manifest hash others. Its size stays what it was."""
    base, ft = llama_pair(tmp_path, shards=2)
    (ft / "tokenizer.json").write_text('{"a": 1}')

    def change() -> None:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b": ", b" :", 1))
        assert (tmp_path / name).read_bytes() != content

    class Change(pome.Progress):
        def finish(self, task: str) -> None:
            if task == "edit":
                change()

    if when == "within one":
        with pytest.raises(CheckpointError, match=f"{name}: changed while being read"):
            edit(base, ft, tmp_path / "out", progress=Change())
        assert not (tmp_path / "out").exists()
    else:
        with monkeypatch.context() as patch:
            interrupt_after(1, patch)
            with pytest.raises(Interrupted):
                edit(base, ft, tmp_path / "out")
        change()
        assert "unfinished run of another command" in refuse(tmp_path, tmp_path / "out")


def test_a_commit_while_workers_open_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync lets other threads run, which may come to another shard meanwhile."""
    base, ft = llama_pair(tmp_path, layers=12, shards=8)
    monkeypatch.setattr(pome.output.commits, "COMMIT_UNITS", 1)
    fdatasync = os.fdatasync

    def slow(fd: int) -> None:
        time.sleep(0.002)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    spec = EditSpec(layers=("ffn",))
    for name in ("one", "two", "three"):
        assert len(edit(base, ft, tmp_path / name, spec).tensors) == 36


def test_an_interrupt_does_not_wait_for_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task hashes what no unit touched; Ctrl-C amid it must not wait for the rest."""
    base, ft = llama_pair(tmp_path)
    for i in range(200):
        (ft / f"side{i}.txt").write_text("x" * 100)
    hashed: list[str] = []

    class Stop(pome.Progress):
        def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
            if task == "hash":
                hashed.append(note)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        edit(base, ft, tmp_path / "out", progress=Stop())
    assert len(hashed) < 20
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)


@pytest.mark.parametrize("damage", ["cut", "torn", "garbage", "another shape", "lost"])
def test_after_a_damaged_journal_the_output_is_still_byte_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    base, ft = stop_in_the_middle(tmp_path, monkeypatch)
    journal = tmp_path / STAGING / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert sum(b'"unit"' in line for line in lines) == 1
    damaged = {
        "cut": b"".join(lines)[:-1],
        "torn": b"".join(lines) + b'{"unit": "model.la',
        "garbage": b"".join(lines[:-1]) + b"\0\0\0\n",
        "another shape": b"".join(lines[:-1]) + b'{"unit": "x", "file": []}\n',
        "lost": b"",
    }
    journal.write_bytes(damaged[damage])
    started = interrupt_after(100, monkeypatch)
    edit(base, ft, tmp_path / "out")
    assert len(started) == (1 if damage == "torn" else 2)
    assert_only_edited(ft, tmp_path / "out", UP)
    edit(base, ft, tmp_path / "again")
    assert_same_output(tmp_path / "out", tmp_path / "again")


def test_a_copy_that_was_cut_since_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = stop_in_the_middle(tmp_path, monkeypatch)
    os.truncate(tmp_path / STAGING / "output/model.safetensors", 3000)
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)


def test_a_journal_line_is_written_after_the_bytes_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = llama_pair(tmp_path)
    events: list[str] = []
    synced, written = os.fdatasync, os.write

    def fdatasync(fd: int) -> None:
        events.append("synced")
        synced(fd)

    def write(fd: int, data: Any) -> int:
        if b'"unit"' in bytes(data):
            events.append("journalled")
        return written(fd, data)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(pome.output.commits, "COMMIT_UNITS", 1)
    edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",)))
    assert events.count("journalled") == 6
    for i, event in enumerate(events):
        if event == "journalled":
            assert events[i - 1] == "synced"


def test_a_second_run_on_one_out_is_refused(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    with Staging(tmp_path / "out", {"any": "command"}, fresh=False) as staging:
        with pytest.raises(OutputError, match=rf"another run \(process {os.getpid()} .* is making this output"):
            edit(base, ft, tmp_path / "out")
        staging.discard()
    edit(base, ft, tmp_path / "out")


def test_an_out_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)

    class Intruder(pome.Progress):
        def finish(self, task: str) -> None:
            if task == "edit":
                (tmp_path / "out").mkdir()

    with pytest.raises(OutputError, match="appeared meanwhile"):
        edit(base, ft, tmp_path / "out", progress=Intruder())
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out").rmdir()
    edit(base, ft, tmp_path / "out")
    assert_only_edited(ft, tmp_path / "out", UP)


def test_an_input_that_changes_during_the_run_ends_it(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)

    class Writer(pome.Progress):
        def finish(self, task: str) -> None:
            if task == "edit":
                info = (base / "model.safetensors").stat()
                os.utime(base / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns + 10**9))

    with pytest.raises(pome.CheckpointError, match="changed while being read"):
        edit(base, ft, tmp_path / "out", progress=Writer())
    assert not (tmp_path / "out").exists()


def test_a_read_only_input_gives_a_writable_output(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    (ft / "model.safetensors").chmod(0o444)
    edit(base, ft, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out/model.safetensors").stat().st_mode) == 0o644


def test_a_target_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    assert check_target(tmp_path / "new/deep/out", [base, ft], False) == tmp_path / "new/deep/out"
    edit(base, ft, tmp_path / "new/deep/out")
    assert read_tensors(tmp_path / "new/deep/out").keys() == random_llama().keys()
    assert json.loads((tmp_path / "new/deep/out/config.json").read_text()) == LLAMA
