"""The command line: what it prints, exit statuses, errors without tracebacks, signals, and what it does not load."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pome
from pome.cli.app import run_command
from support.checkpoints import (
    LLAMA,
    assert_only_edited,
    environment,
    hash_tree,
    llama_pair,
    perturb,
    random_llama,
    read_manifest,
    read_tensors,
    run_python,
    write_checkpoint,
)

UP = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


@pytest.fixture(autouse=True)
def _as_in_a_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No terminal, no colour, a log's width; and the handler of SIGTERM put back."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A small pair at `base` and `ft` of the working folder, so that messages are the same everywhere."""
    llama_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "base", "ft"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one command."""
    status = run_command(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_an_edit_from_end_to_end(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "edit", *pair, "out")
    assert (status, out) == (0, "")
    assert_only_edited(Path("ft"), Path("out"), UP)
    lines = err.splitlines()
    assert lines[0] == (
        "base (pretrained) -> ft (fine-tuned)   2 of 11 tensors to edit (up), 9 kept   10.2 kB to read, 5.1 kB to write"
    )  # 2 sides x 2 matrices x 40 x 16 float32
    assert lines[1].startswith("device ")
    assert re.fullmatch(r"copying \d+\.\d kB: done in \d+\.\d s", lines[2])
    assert re.fullmatch(r"editing 2 units: done in \d+\.\d s", lines[3])
    assert re.fullmatch(r"hashing \d+\.\d kB: done in \d+\.\d s", lines[4])
    heads = ["role", "matrices", "rank", "k", "energy kept", "departure", "lost to rounding", "warnings"]
    assert lines[5].split("  ") == heads
    cells = lines[6].split()
    assert cells[:4] == ["up", "2", "16", "8"]
    assert 0.5 < float(cells[4]) < 1 and 0.1 < float(cells[5]) < 1
    assert re.fullmatch(r"out: \d+\.\d kB, 2 matrices edited, every other byte as in FT, in \d+\.\d s", lines[7])
    assert lines[8:] == [
        "manifest: out/pome_manifest.json",
        "to verify it:",
        "  pome verify out --base base --ft ft",
        "An edit is a hypothesis until `pome sweep` or a test of your own has tried it.",
    ]
    assert run(capsys, *lines[10].split()[1:])[0] == 0


def test_verify_ends_with_ok_or_the_number_of_differences(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "edit", *pair, "out", "--quiet")[0] == 0
    status, _, err = run(capsys, "verify", "out", "--base", "base", "--ft", "ft")
    assert status == 0
    assert re.fullmatch(r"out: 2 files hashed, \d+\.\d kB compared with FT, 2 edits recomputed\nOK\n", err)
    Path("out/config.json").write_text("{}")
    status, _, err = run(capsys, "verify", "out")
    assert status == 1
    assert err.splitlines()[-2:] == ["out: 2 files hashed", "1 difference"]
    Path("out/more.json").write_text("{}")
    assert run(capsys, "verify", "out")[2].splitlines()[-1] == "2 differences"


def test_quiet_prints_nothing_and_json_one_document(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "edit", *pair, "quiet", "--quiet") == (0, "", "")
    status, out, err = run(capsys, "edit", *pair, "out", "--json")
    assert (status, out) == (0, Path("out/pome_manifest.json").read_text())
    assert "2 matrices edited" in err
    assert read_manifest(Path("quiet")) == read_manifest(Path("out"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = hash_tree(tmp_path)
    status, out, err = run(capsys, "edit", *pair, "out", "--dry-run", "--layers", "ffn", "--dtype", "bfloat16")
    assert (status, out) == (0, "")
    assert err.splitlines()[:5] == [
        "base (pretrained) -> ft (fine-tuned)   6 of 11 tensors to edit (down, gate, up), 5 kept   "
        "30.7 kB to read, 7.7 kB to write",
        "role  matrices    shape        dtype     read   write",
        "down         2  16 x 40  F32 -> BF16  10.2 kB  2.6 kB",
        "gate         2  40 x 16  F32 -> BF16  10.2 kB  2.6 kB",
        "up           2  40 x 16  F32 -> BF16  10.2 kB  2.6 kB",
    ]
    assert re.fullmatch(
        r"device auto \(chosen when the edit starts\), expected memory \d+\.\d [MG]B", err.splitlines()[5]
    )
    assert re.match(r"(expected time \d|no time: )", err.splitlines()[6])
    needed = r"disk: \d+\.\d kB needed \(less where .*\), \d+\.\d [kMGT]B free in (.*)"
    assert re.fullmatch(needed, err.splitlines()[7])[1] == str(tmp_path)
    assert len(err.splitlines()) == 8
    status, out, _ = run(capsys, "edit", *pair, "out", "--dry-run", "--json")
    document = json.loads(out)
    assert [item["name"] for item in document["edit"]] == UP
    assert (document["keep"], document["bytes_written"]) == ([], 2 * 40 * 16 * 4)
    assert hash_tree(tmp_path) == before
    Path("out").mkdir()
    status, _, err = run(capsys, "edit", *pair, "out", "--dry-run", "--device", "cpu")
    assert status == 0 and "device cpu, expected memory" in err
    assert err.endswith(f"{tmp_path}/out exists: it needs --overwrite to be replaced, or another OUT\n")


def test_warnings_and_kept_tensors_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = random_llama() | {UP[1]: torch.zeros(40, 16)}
    ft = base | {UP[1]: torch.eye(40, 16)}  # every singular value is 1, exactly: the cut falls into a cluster
    write_checkpoint(tmp_path / "base", base, config=LLAMA)
    write_checkpoint(tmp_path / "ft", ft, config=LLAMA)
    status, _, err = run(capsys, "edit", "base", "ft", "out")
    assert status == 0
    assert "kept 1: its delta is zero: FT equals BASE\n" in err
    assert f"above it. Answer: --rank-ratio or --rank, with another number ({UP[1]})\n" in err
    assert "warning: 1 of 1: The singular values on both sides of the cut are as good as equal" in err
    write_checkpoint(tmp_path / "same", base, config=LLAMA)
    status, _, err = run(capsys, "edit", "base", "same", "out2")
    assert status == 0
    assert "warning: no matrix was edited; OUT equals FT" in err
    assert_only_edited(tmp_path / "same", tmp_path / "out2", [])


def test_every_option_reaches_the_manifest(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--layers up --layers re:down --exclude layers.1 --rank-ratio 0.25 --scale rms --beta 1.5 --device cpu"
    status, *_ = run(capsys, "edit", *pair, "out", *options.split(), "--dtype", "float16", "--engine", "local")
    assert status == 0
    given = {
        "layers": ["up", "re:down"], "exclude": ["layers.1"], "rank_ratio": 0.25, "scale": "rms", "beta": 1.5,
        "device": "cpu", "dtype": "float16",
    }  # fmt: skip
    assert read_manifest(Path("out"))["spec"] == {**pome.EditSpec().to_mapping(), **given}


def test_a_config_file_holds_options_and_options_win(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("edit.yaml").write_text("layers: [gate]\nrank_rule: energy\nenergy: 0.8\nbeta: 2.0\n")
    for out, options in (("one", []), ("two", ["--rank", "3", "--layers", "up"])):
        assert run(capsys, "edit", *pair, out, "--config", "edit.yaml", *options)[0] == 0
    one, two = (read_manifest(Path(out))["spec"] for out in ("one", "two"))
    assert (one["layers"], one["rank_rule"], one["energy"], one["beta"]) == (["gate"], "energy", 0.8, 2.0)
    assert (two["layers"], two["rank_rule"], two["rank"], two["beta"]) == (["up"], "fixed", 3, 2.0)


def spoil(path: str, value: float) -> Callable[[], None]:
    def write() -> None:
        tensors = read_tensors(Path(path))
        tensors[UP[0]][0, 0] = value
        save_file(tensors, f"{path}/model.safetensors")

    return write


def truncate() -> None:
    os.truncate("ft/model.safetensors", 3000)


def reshape() -> None:
    save_file(read_tensors(Path("ft")) | {UP[0]: torch.zeros(41, 16)}, "ft/model.safetensors")


def shard_and_lose() -> None:
    write_checkpoint(Path("shards"), perturb(random_llama()), shards=3)
    Path("shards/model-00003-of-00003.safetensors").unlink()


def write_oddities() -> None:
    for folder, file in (("pickled", "pytorch_model.bin"), ("adapter", "adapter_model.safetensors")):
        Path(folder).mkdir()
        save_file({"x": torch.ones(2)}, Path(folder) / file)
    Path("adapter/adapter_config.json").write_text("{}")
    Path("words.txt").write_text("no")
    Path("bad.yaml").write_text("beta: 1.0\nrank_ration: 0.5\n")


def nothing() -> None: ...


ERRORS: dict[str, tuple[Callable[[], None], str, int, str]] = {
    "nan": (spoil("ft", float("nan")), "base ft out", 1, rf"tensor {UP[0]}: FT holds NaN or infinity"),
    "infinity in base": (spoil("base", float("inf")), "base ft out", 1, rf"tensor {UP[0]}: BASE holds NaN or inf"),
    "shapes": (reshape, "base ft out", 1, r"ft/model.safetensors: tensor .*shape \[41, 16\] is not BASE's \[40, 16\]"),
    "missing shard": (shard_and_lose, "base shards out", 1, "model-00003-of-00003.safetensors: missing"),
    "truncated": (truncate, "base ft out", 1, "ft/model.safetensors: .*truncated"),
    "unknown key": (write_oddities, "base ft out --config bad.yaml", 2,
                    r"bad.yaml:2: unknown key 'rank_ration'; did you mean 'rank_ratio'\?"),
    "no config": (nothing, "base ft out --config none.yaml", 2, "none.yaml: cannot be read: No such file"),
    "in ft": (nothing, "base ft ft/out", 1, "ft/out: OUT lies inside ft"),
    "is ft": (nothing, "base ft ft", 1, "ft: OUT is ft; choose a folder outside the inputs"),
    "is base": (nothing, "base ft base --overwrite", 1, "base: OUT is base; choose a folder outside the inputs"),
    "around ft": (nothing, "base ft .", 1, "OUT holds base"),
    "exists": (write_oddities, "base ft adapter", 1, "adapter: exists; choose another OUT or give --overwrite"),
    "pickled": (write_oddities, "base pickled out", 1, "pytorch_model.bin: pickled weights are never unpickled"),
    "adapter": (write_oddities, "adapter ft out", 1, "adapter: an adapter; give as BASE the model that it was trained"),
    "same": (nothing, "ft ft out", 1, "ft: BASE and FT are the same files"),
    "no checkpoint": (write_oddities, "base words.txt out", 1, "words.txt: not a .safetensors file"),
    "not there": (nothing, "base ./gone out", 1, "gone: no such file or folder"),
    "no match": (nothing, "base ft out --layers v", 1, "no tensor matches --layers v; .*can be pasted:"),
    "role": (nothing, "base ft out --layers upp", 2, "--layers: 'upp' is neither a role .*did you mean 'up'"),
    "range": (nothing, "base ft out --rank-ratio 2", 2, "--rank-ratio: 2.0 is not a number above 0 and at most 1"),
    "no number": (nothing, "base ft out --rank x", 2, "--rank: 'x' is not a whole number of at least 1"),
    "no choice": (nothing, "base ft out --scale frob", 2, "--scale: 'frob' is not one of .*did you mean 'frobenius'"),
    "at odds": (nothing, "base ft out --rank 3 --rank-rule energy", 2, "exclude each other"),
    "device": (nothing, "base ft out --device cuda:99", 1, "device cuda:99 is not there"),
    "no effect": (nothing, "base ft out --rank 3 --rank-ratio 0.3", 2, "--rank-ratio: has no effect with --rank"),
    "no BASE": (nothing, "'' ft out", 2, "BASE: empty; is a variable unset\\?"),
    "no OUT": (nothing, "base ft ''", 2, "OUT: empty"),
    "no pattern": (nothing, "base ft out --exclude ''", 2, "--exclude: empty"),
    "no file": (nothing, "base ft out --config=", 2, "--config: empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_message_and_leaves_everything_as_it_was(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    prepare, arguments, wanted, said = ERRORS[case]
    prepare()
    before = hash_tree(tmp_path)
    status, out, err = run(capsys, "edit", "-q", *shlex.split(arguments))
    assert (status, out) == (wanted, "")
    assert re.match(rf"error: .*{said}", err)
    assert err.count("error: ") == 1
    assert case == "no match" or err.count("\n") == 1
    assert hash_tree(tmp_path) == before


def test_the_line_that_a_message_offers_works_when_pasted(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "edit", *pair, "out", "--layers", "k")
    assert status == 1
    line = next(line for line in err.splitlines() if "down_proj" in line)
    # The whole line goes to the shell but for the counts behind it.
    pasted = shlex.split(line.rpartition("   ")[0])
    assert run(capsys, "edit", *pair, "out", *pasted)[0] == 0
    assert_only_edited(Path("ft"), Path("out"), [name.replace("up", "down") for name in UP])


def test_a_full_disk_is_one_message(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = run(capsys, "edit", "-q", *pair, "out")
    assert (status, out) == (1, "")
    assert re.fullmatch(
        r"error: .*out.pome-staging.*: No space left on device; make room there, then run the same command again .*\n",
        err,
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments",
    ["edit base", "edit", "edit base ft out --no-such", "edit base ft out --rank", "edut base ft out",
     "edit base ft out more", "batch"],
)  # fmt: skip
def test_a_usage_error_has_status_two(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert "Usage: pome" in err
    assert sorted(path.name for path in Path().iterdir()) == ["base", "ft"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("inspect ft", r"ft: give BASE and FT, or one output of pome \(a folder with pome_manifest.json\)"),
        ("inspect out --layers down", "--layers: has no effect on an output"),
        ("inspect out --weights", "--weights: has no effect on an output"),
        ("inspect base ft --beta 2", "--beta: has no effect without --weights; give both or neither"),
        ("verify out --full", "--full: every edit is recomputed from both sides; give BASE and FT too"),
        ("verify out --base base", "--base: an edit is recomputed from both sides; give FT too"),
        ("verify out --base base --ft ''", "--ft: empty; is a variable unset"),
    ],
)
def test_sides_and_options_that_do_not_fit_a_command_are_a_usage_error(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    status, out, err = run(capsys, *shlex.split(arguments))
    assert (status, out) == (2, "")
    assert re.match(f"error: {said}", err) and err.count("\n") == 1


def test_an_inspection_hears_the_numbers_of_the_rules(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    # 16 singular values; both numbers count at once, because an inspection shows every rule.
    status, out, _ = run(capsys, "inspect", *pair, "--layers", "up", "--rank-ratio", "0.25", "--energy", "1", "--json")
    assert status == 0
    assert {(item["k"]["ratio"], item["k"]["energy"]) for item in json.loads(out)["tensors"]} == {(4, 16)}


def test_a_sweep_uploads_only_where_somebody_is_logged_in(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = hash_tree(tmp_path)
    status, _, err = run(capsys, "sweep", *pair, "out", "--score-cmd", "echo 1 {model}", "--push-to-hub", "me/it")
    assert status == 1 and err.startswith("error: me/it: ")
    assert hash_tree(tmp_path) == before


def test_overwrite_and_fresh_are_heard(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "edit", "-q", *pair, "out")[0] == 0
    assert run(capsys, "edit", "-q", *pair, "out", "--beta", "2")[0] == 1
    assert run(capsys, "edit", "-q", *pair, "out", "--beta", "2", "--overwrite")[0] == 0
    assert read_manifest(Path("out"))["spec"]["beta"] == 2.0
    Path("new.pome-staging/output").mkdir(parents=True)
    Path("new.pome-staging/command").write_text("{}")
    assert run(capsys, "edit", "-q", *pair, "new")[0] == 1
    assert run(capsys, "edit", "-q", *pair, "new", "--fresh")[0] == 0


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"pome {pome.__version__}\n", "")
    status, out, _ = run(capsys, "edit", "--help-all")
    assert status == 0
    for option in ("--layers", "--exclude", "--rank-ratio", "--rank-rule", "--energy", "--scale", "--beta", "--device",
                   "--dtype", "--engine", "--config", "--dry-run", "--json", "--overwrite", "--fresh"):  # fmt: skip
        assert option in out
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "edit" in out and "batch" in out


NO_TORCH = """
import json, sys
import pome
pome.EditSpec(layers=("ffn",)), pome.PomeError
from pome.cli.app import run_command
loaded = {"import pome": "torch" in sys.modules}
for arguments in json.loads(sys.argv[1]):
    status = run_command(arguments)
    loaded[" ".join(arguments)] = [status, "torch" in sys.modules]
print("RESULT" + json.dumps(loaded))
"""


def test_help_dry_runs_and_refusals_load_no_torch(pair: tuple[str, str]) -> None:
    Path("bad.yaml").write_text("rank_ration: 1\n")
    expected = {
        "--version": 0, "--help": 0, "edit --help": 0, "batch --help": 0, "edit base ft out --dry-run": 0,
        "edit base ft out --dry-run --json --quiet": 0, "estimate base ft": 0, "estimate base ft --on gpu": 0,
        "edit base": 2, "edit base ft out --rank-ratio 7": 2,
        "edit base ft out --config bad.yaml": 2, "edit base ft base": 1, "edit base gone out": 1, "batch bad.yaml": 2,
    }  # fmt: skip
    result = run_python("-c", NO_TORCH, json.dumps([line.split() for line in expected]))
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.rpartition("RESULT")[2])
    assert loaded.pop("import pome") is False
    assert loaded == {line: [status, False] for line, status in expected.items()}


def test_the_module_runs_as_the_command() -> None:
    result = run_python("-m", "pome", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"pome {pome.__version__}\n", "")


def test_a_reader_that_goes_away_is_no_error_of_ours(pair: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "pome", "edit", *pair, "out", "--dry-run", "--json", "--quiet"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment(), text=True, timeout=120, check=False
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_stream_that_is_closed_is_written_to_by_nobody(pair: tuple[str, str], closed: str) -> None:
    line = f"{shlex.quote(sys.executable)} -m pome edit base ft out --json {closed}"
    result = subprocess.run(
        line, shell=True, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert_only_edited(Path("ft"), Path("out"), UP)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="macOS has no /dev/full; Linux, on which CI runs, has it")
def test_a_document_that_cannot_be_written_is_told_from_the_edit(pair: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "pome", "edit", *pair, "out", "--json", "--quiet"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment(), text=True, timeout=120, check=False
        )
    said = "error: out is complete, but the document of --json could not be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, said)
    assert_only_edited(Path("ft"), Path("out"), UP)


# An import in the place of typer's that is stopped, as by Ctrl-C.
INTERRUPTED_IMPORT = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
sys.argv = ["pome", "--version"]
from pome.__main__ import main
main()
"""


def test_an_interrupt_amid_the_imports_is_one_message() -> None:
    result = run_python("-c", INTERRUPTED_IMPORT)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "error: interrupted; run the same command again\n"


# The command itself, but with matrices slow enough to be stopped between them, each journalled on its own.
SLOWLY = """
import time
import pome.editing.unit, pome.output.commits
from pome.__main__ import main
patch_unit = pome.editing.unit.patch_unit
def patch_slowly(*arguments):
    time.sleep(0.2)
    return patch_unit(*arguments)
pome.editing.unit.patch_unit, pome.output.commits.COMMIT_UNITS = patch_slowly, 1
main()
"""


# A matrix that is finished when a file appears, and not before.
HELD = SLOWLY.replace(
    "time.sleep(0.2)", "open('begun', 'w').close()\n    while not os.path.exists('go'): time.sleep(0.01)"
)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_acknowledged_while_a_matrix_is_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    llama_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    held = [sys.executable, "-c", f"import os{HELD}", "edit", "base", "ft", "out"]
    one_core = {**environment(), "OMP_NUM_THREADS": "1"}  # more would work on both matrices at a time
    with subprocess.Popen(held, stderr=subprocess.PIPE, text=True, env=one_core) as process:
        while not Path("begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        assert process.stderr is not None
        said = ""
        while said != "stopping after this matrix\n":
            said = process.stderr.readline()
            assert said, "the process ended without a word"
        Path("go").touch()
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.startswith("error: interrupted; 1 of 2 units are safe in ")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    import pome.editing.unit

    llama_pair(tmp_path, layers=10)
    monkeypatch.chdir(tmp_path)
    command = ["edit", "base", "ft", "out"]
    slowly = [sys.executable, "-c", SLOWLY, *command]
    journal, limit = tmp_path / "out.pome-staging/journal", time.monotonic() + 90
    with subprocess.Popen(slowly, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        while not journal.exists() or journal.read_bytes().count(b'"unit"') < 2:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert "Traceback" not in err
    assert not Path("out").exists()
    # A signal between a journal line and its noting down makes the line stand twice, which is harmless.
    lines = journal.read_bytes().splitlines()
    done = len({json.loads(line).get("unit") for line in lines} - {None})
    assert 2 <= done < 10
    if how != signal.SIGKILL:
        said = rf"^error: interrupted; {done} of 10 units are safe in .*; run the same command again to go on"
        assert re.search(said, err, re.MULTILINE)
    started = []
    patch_unit = pome.editing.unit.patch_unit
    monkeypatch.setattr(
        pome.editing.unit, "patch_unit", lambda *all_: started.append(all_[0].name) or patch_unit(*all_)
    )
    status, _, err = run(capsys, *command)
    assert status == 0
    assert f"going on: {done} of 10 units were finished by an earlier run" in err
    assert len(started) == 10 - done
    run(capsys, "edit", "base", "ft", "undisturbed")
    assert read_manifest(Path("out")) == read_manifest(Path("undisturbed"))
    for path in Path("undisturbed").iterdir():
        if path.name != "pome_manifest.json":
            assert path.read_bytes() == (Path("out") / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft", "out", "undisturbed"]
