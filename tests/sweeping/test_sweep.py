"""`pome sweep` end to end: candidates that are what `edit` writes, scorers that fail, runs that are killed."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pome import EditSpec, Equalized, edit, make_grid, make_scorer, sweep
from pome.cli.app import run_command
from pome.errors import OutputError, PomeError, ScoreError
from pome.kernel import ladder
from pome.kernel.equalize import equalize_matrix, equalize_product
from pome.kernel.equivalence import Matched, match_matrix
from pome.reports.sweep_data import list_heat_maps
from pome.sweeping.cache import DecompositionFolder
from pome.sweeping.scorers.language import load_model
from pome.sweeping.trials import Listener
from support.browser import open_page
from support.checkpoints import (
    LLAMA,
    environment,
    hash_tree,
    llama_pair,
    perturb,
    read_manifest,
    read_tensors,
    run_python,
    write_checkpoint,
)
from support.recipes import make_recipe
from support.reference import plant
from support.tiny_models import tiny_config, tiny_model

# A number for a model: the checksum of its weights. No two candidates have the same.
CHECKSUM = "cksum < {model}/model.safetensors | cut -d' ' -f1"
WORDS = """the a cat dog sat ran on mat far away and then it was all good bad news for old men""".split()  # noqa: SIM905


@pytest.fixture
def pair(tmp_path):
    return llama_pair(tmp_path)


@pytest.fixture(autouse=True)
def _keep_the_signal():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def keep_copies(folder: Path) -> str:
    """A scorer that puts every model's weights aside, named by the score that it gives."""
    folder.mkdir()
    return f"n=$({CHECKSUM}); cp {{model}}/model.safetensors {shlex.quote(str(folder))}/$n; echo $n"


def checksum(file: Path) -> int:
    return int(subprocess.run(["cksum", str(file)], capture_output=True, text=True, check=True).stdout.split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_candidate_is_what_edit_writes_bit_for_bit(tmp_path, dtype):
    """Matrices of all sizes that the ladder treats apart: small, float64, float32 with deflation, wide and tall."""
    shapes = {"up": (40, 24), "gate": (300, 160), "down": (1030, 1024)}
    torch.manual_seed(0)
    base = {
        f"model.layers.0.mlp.{role}_proj.weight": (torch.randn(shape) * 0.02).to(dtype)
        for role, shape in shapes.items()
    }
    base["model.norm.weight"] = torch.ones(24, dtype=dtype)
    tuned = perturb(base)
    low = "model.layers.0.mlp.down_proj.weight"
    tuned[low] = (base[low].double() + plant(1.0 / torch.arange(1.0, 1025), 1030, 1024, 3) * 0.1).to(dtype)
    paths = [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("base", base), ("ft", tuned))]
    cuts = {"rank_ratio": [0.3, 0.7], "rank_rule": "effective"}
    grid = make_grid({"layers": ["ffn", "up+down"], **cuts, "scale": "mean", "beta": [1.0, 1.7]})
    kept = tmp_path / "kept"
    outcome = sweep(*paths, tmp_path / "out", grid, make_scorer(score_cmd=keep_copies(kept)))
    tried = [trial for trial in outcome.trials if trial.candidate]
    assert len(tried) == grid.size == 12
    for i, trial in enumerate(tried):
        out = tmp_path / f"edit-{i}"
        edit(*paths, out, trial.candidate.spec)
        name = f"{int(trial.score.scored.value)}"
        assert (kept / name).read_bytes() == (out / "model.safetensors").read_bytes(), trial.label
    by_name = {trial.label: trial.score.scored.value for trial in outcome.trials}
    assert by_name["fine-tuned"] == checksum(paths[1] / "model.safetensors")
    assert by_name["base"] == checksum(paths[0] / "model.safetensors")


@pytest.mark.parametrize("kind", ["svd", "gram", "deflated", "undecided", "factors", "thin", "thin-undecided"])
def test_a_cached_decomposition_changes_no_bit_of_an_edit(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(ladder, "THIN", 0)
    monkeypatch.setattr(ladder, "SHARE", 1.0)
    n, dtype = {"svd": (60, torch.float32), "gram": (150, torch.float64)}.get(kind, (220, torch.float32))
    sigma = 10.0 ** (-7.0 * torch.arange(n) / n) if kind == "undecided" else 1.0 / torch.arange(1.0, n + 1)
    sigma = torch.linspace(1.0, 0.9, n) if kind == "thin-undecided" else sigma
    delta = plant(sigma, n + 30, n, 0, dtype)

    class Named:
        key, label = "unit", staticmethod(lambda part: None)

    cache = DecompositionFolder(tmp_path / "decompositions").find_cache(Named, None)
    b, a = delta[:, :9].contiguous(), delta[:9].contiguous()
    for round_ in range(2):  # the second time all comes from the files
        for ratio in (0.2, 0.5, 0.9):
            for beta in (1.0, 1.3):
                number = {"rank": round(10 * ratio)} if kind.startswith("thin") else {"rank_ratio": ratio}
                recipe = make_recipe("fixed" if "rank" in number else "ratio", beta=beta, **number)
                if kind == "factors":
                    plain, kept = (equalize_product(b, a, recipe, c) for c in (None, cache))
                else:
                    plain, kept = (equalize_matrix(delta, recipe, c) for c in (None, cache))
                assert torch.equal(plain.value, kept.value), (round_, ratio)
                assert torch.equal(plain.sigma, kept.sigma)
                assert (plain.solver == "thin") == (kind == "thin")
                for field in Equalized.__dataclass_fields__.keys() - {"value", "sigma"}:
                    assert getattr(plain, field) == getattr(kept, field)
    assert len(cache) >= 1


@pytest.mark.parametrize("n", [60, 150])
def test_a_cached_decomposition_changes_no_bit_of_an_equivalence(tmp_path, n):
    class Named:
        key, label = "unit", staticmethod(lambda part: None)

    cache = DecompositionFolder(tmp_path / "decompositions").find_cache(Named, None)
    W_base, W_ft = (plant(torch.linspace(1.0, 0.5 - i / 10, n), n + 30, n, i) for i in range(2))
    for round_ in range(2):
        for beta in (1.0, 1.3):
            plain, kept = (match_matrix(W_base, W_ft, beta, c) for c in (None, cache))
            assert torch.equal(plain.value, kept.value) and torch.equal(plain.sigma, kept.sigma), round_
            for field in Matched.__dataclass_fields__.keys() - {"value", "sigma"}:
                assert getattr(plain, field) == getattr(kept, field)
    assert len(cache) == 2


def test_methods_are_an_axis_and_the_sweep_writes_what_edit_writes(pair, tmp_path):
    """Options of rank and scale have no effect with one method: it is one candidate for each beta."""
    grid = make_grid({"method": "equalize,equivalence", "rank_ratio": "0.25,0.5", "beta": "0.5,1"})
    kept = tmp_path / "kept"
    outcome = sweep(*pair, tmp_path / "out", grid, make_scorer(score_cmd=keep_copies(kept)), write_best=True)
    labels = {trial.label for trial in outcome.trials if trial.candidate}
    assert labels >= {"up equivalence beta=0.5", "up equivalence beta=1"} and len(labels) == grid.size == 6
    for trial in outcome.trials:
        if trial.candidate and "equivalence" in trial.label:
            out = tmp_path / f"alone {trial.label}"
            edit(*pair, out, trial.candidate.spec)
            name = f"{int(trial.score.scored.value)}"
            assert (kept / name).read_bytes() == (out / "model.safetensors").read_bytes(), trial.label
    maps = {heat.title: heat for heat in list_heat_maps(outcome)}
    assert maps.keys() == {"up, scale frobenius", "up, equivalence"}
    assert [len(heat.rows) for heat in maps.values()] == [2, 1]
    assert all(cell is not None for heat in maps.values() for row in heat.cells for cell in row)


class Counter(Listener):
    def __init__(self):
        self.told = []

    def tell(self, trial, number, count):
        self.told.append((trial.label, trial.earlier))


def test_the_best_is_written_with_the_record_of_the_sweep(pair, tmp_path):
    before = [hash_tree(folder) for folder in pair]
    grid = make_grid({"rank_ratio": "0.25,0.5", "beta": "1,1.5"})
    outcome = sweep(*pair, tmp_path / "out", grid, make_scorer(score_cmd=CHECKSUM), write_best=True)
    best = max((t for t in outcome.trials if t.candidate), key=lambda t: t.score.scored.value)
    assert outcome.best.key == best.key
    edit(*pair, tmp_path / "plain", best.candidate.spec)
    assert read_tensors(tmp_path / "out").keys() == read_tensors(tmp_path / "plain").keys()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert weights[0] == weights[1]
    record = read_manifest(tmp_path / "out")["sweep"]
    assert record["grid"] == grid.to_mapping() and record["scorer"] == {"score_cmd": CHECKSUM, "minimize": False}
    assert len(record["candidates"]) == 6 and record["best"]["params"] == best.candidate.params
    assert read_manifest(tmp_path / "plain")["sweep"] is None
    assert [hash_tree(folder) for folder in pair] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft", "out", "plain"]
    assert run_command(["verify", str(tmp_path / "out"), "--base", str(pair[0]), "--ft", str(pair[1]), "--full"]) == 0


def test_nothing_is_written_when_nothing_beats_the_fine_tuned_model(pair, tmp_path, capsys):
    log = tmp_path / "log"
    command = f"echo {{model}} >> {log}; echo 0.5"
    arguments = ["sweep", *map(str, pair), str(tmp_path / "out"), "--score-cmd", command, "--beta", "1,2"]
    assert run_command([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert "Nothing beats the fine-tuned model beyond noise" in captured.err
    assert "--write-best writes the best all the same" in captured.err
    found = json.loads(captured.out)
    assert not found["written"] and not found["beats_fine_tuned"]
    assert [c["score"] for c in found["candidates"]] == [0.5] * 4
    assert not (tmp_path / "out").exists()
    assert len(log.read_text().splitlines()) == 4
    # The scores are still there: with --write-best nothing is scored again.
    assert run_command([*arguments, "--write-best"]) == 0
    assert len(log.read_text().splitlines()) == 4
    assert (tmp_path / "out" / "pome_manifest.json").is_file()
    assert not list(tmp_path.glob("*.pome-*"))


def test_a_longer_list_scores_only_what_is_new(pair, tmp_path):
    listener = Counter()
    for betas in ("1,1.5", "1,1.5,2"):
        listener.told.clear()
        scorer = make_scorer(score_cmd="echo 1 {model} | cut -c1")
        sweep(*pair, tmp_path / "out", make_grid({"beta": betas}), scorer, listener=listener)
    assert listener.told == [
        ("fine-tuned", True), ("base", True), ("up K=0.5 frobenius beta=1", True),
        ("up K=0.5 frobenius beta=1.5", True), ("up K=0.5 frobenius beta=2", False),
    ]  # fmt: skip


def test_another_scorer_is_not_mixed_with_the_first(pair, tmp_path):
    grid = make_grid({})
    sweep(*pair, tmp_path / "out", grid, make_scorer(score_cmd="echo 1; : {model}"))
    with pytest.raises(OutputError, match="unfinished run of another command .it differs in score_cmd"):
        sweep(*pair, tmp_path / "out", grid, make_scorer(score_cmd="echo 2; : {model}"))
    listener = Counter()
    sweep(*pair, tmp_path / "out", grid, make_scorer(score_cmd="echo 2; : {model}"), listener=listener, fresh=True)
    assert not any(earlier for _, earlier in listener.told)


FAILURES = {
    "crash": ("exit 3", "left with exit status 3"),
    "signal": ("kill -SEGV $$", "was ended by signal 11"),
    "said why": ("echo no head >&2; exit 1", "left with exit status 1: no head"),
    "hang": ("sleep 60", "took longer than 2 seconds"),
    "hang with a child": ("sleep 60 & wait", "took longer than 2 seconds"),
    "nothing": ("true", "printed no number"),
    "nan": ("echo nan", "not a finite number"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failed_score_is_recorded_for_its_candidate_alone(pair, tmp_path, how):
    fault, said = FAILURES[how]
    log = tmp_path / "log"
    # The third model that it sees, the first candidate, is the one that it fails at.
    command = f"echo {{model}} >> {log}; if [ $(wc -l < {log}) = 3 ]; then {fault}; else {CHECKSUM}; fi"
    scorer = make_scorer(score_cmd=command, score_timeout=2.0)
    begun = time.monotonic()
    outcome = sweep(*pair, tmp_path / "out", make_grid({"beta": "1,2"}), scorer)
    assert time.monotonic() - begun < 40
    failed = [trial for trial in outcome.trials if trial.failed]
    assert [trial.label for trial in failed] == ["up K=0.5 frobenius beta=1"]
    assert said in failed[0].failed
    assert outcome.best.label == "up K=0.5 frobenius beta=2"


def test_retry_failed_scores_only_the_failed_candidates_again(pair, tmp_path):
    log = tmp_path / "log"
    seen = f"echo {{model}} >> {log}; if [ $(wc -l < {log}) = 3 ]; then exit 1; fi"
    scorer = make_scorer(score_cmd=f"{seen}; echo 1")  # nothing beats the fine-tuned model, so the scores stay
    for retry, failed, calls in ((False, 1, 4), (False, 1, 4), (True, 0, 5)):
        outcome = sweep(*pair, tmp_path / "out", make_grid({"beta": "1,2"}), scorer, retry_failed=retry)
        assert outcome.manifest is None
        assert (len([trial for trial in outcome.trials if trial.failed]), len(log.read_text().splitlines())) == (
            failed, calls,
        )  # fmt: skip


@pytest.mark.slow
def test_a_fresh_sweep_keeps_no_decomposition_of_another_model(pair, tmp_path):
    """Stopped, FT trained on, and begun anew: what is written is the edit of the new FT."""
    base, ft = pair
    log = tmp_path / "log"
    stop = f"echo x >> {log}; if [ $(wc -l < {log}) = 4 ]; then kill -9 $PPID; fi; {CHECKSUM}"
    arguments = ["sweep", str(base), str(ft), str(tmp_path / "out"), "--beta", "1,2", "--write-best"]
    assert run_python("-m", "pome", *arguments, "--score-cmd", stop).returncode != 0
    assert list((tmp_path / "out.pome-sweep/decompositions").iterdir())
    tensors = read_tensors(ft)
    save_file({name: t + 2e-6 * torch.randn(t.shape) for name, t in tensors.items()}, ft / "model.safetensors")
    refused = run_python("-m", "pome", *arguments, "--score-cmd", stop)
    assert refused.returncode == 1 and "--fresh" in refused.stderr
    done = run_python("-m", "pome", *arguments, "--score-cmd", stop, "--fresh")
    assert done.returncode == 0, done.stderr
    beta = read_manifest(tmp_path / "out")["spec"]["beta"]
    edit(base, ft, tmp_path / "plain", EditSpec(beta=beta))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


def test_without_a_score_for_the_fine_tuned_model_there_is_no_sweep(pair, tmp_path, capsys):
    with pytest.raises(ScoreError, match="the fine-tuned model has no score: the command left with exit status 1"):
        sweep(*pair, tmp_path / "out", make_grid({}), make_scorer(score_cmd="exit 1; {model}"))
    log = tmp_path / "log"
    command = f"echo {{model}} >> {log}; test $(wc -l < {log}) -lt 3 && echo 1"
    with pytest.raises(ScoreError, match="no candidate has a score .the command left with exit status 1"):
        sweep(*pair, tmp_path / "out2", make_grid({}), make_scorer(score_cmd=command))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()


def test_a_base_without_a_score_does_not_end_the_sweep(pair, tmp_path):
    command = f"case {{model}} in *base/output) exit 1;; esac; {CHECKSUM}"
    outcome = sweep(*pair, tmp_path / "out", make_grid({}), make_scorer(score_cmd=command), write_best=True)
    assert [trial.label for trial in outcome.trials if trial.failed] == ["base"]
    assert outcome.manifest is not None


HARM = {
    "caches": f"cd {{model}}; test -f c/n || {{ mkdir c; {CHECKSUM} > c/n; }}; cat c/n",
    "links": f"test -e {{model}}/old && exit 1; ln -s . {{model}}/old; {CHECKSUM}",
    "deletes": f"test -f {{model}}/config.json || exit 1; {CHECKSUM}; rm {{model}}/config.json",
    "rewrites": f"grep -q ha {{model}}/config.json && exit 1; echo ha > {{model}}/config.json; {CHECKSUM}",
    "converts": f"n=$({CHECKSUM}); echo x >> {{model}}/model.safetensors; echo $n",
    "replaces": f"cd {{model}}; n=$({CHECKSUM}); cp -p *.safetensors x; echo >> x; mv x model.safetensors; echo $n",
    "removes all": f"{CHECKSUM}; rm -r {{model}}/*",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HARM)
def test_files_that_a_command_changes_are_restored_for_the_next_model(pair, tmp_path, how):
    before = [hash_tree(folder) for folder in pair]
    grid = make_grid({"layers": ["ffn", "up"], "beta": [1.0, 1.5]})
    wanted = sweep(*pair, tmp_path / "wanted", grid, make_scorer(score_cmd=CHECKSUM))
    outcome = sweep(*pair, tmp_path / "out", grid, make_scorer(score_cmd=HARM[how]))
    assert [trial.failed for trial in outcome.trials] == [None] * 6
    scores = [{t.label: t.score.scored.value for t in one.trials} for one in (wanted, outcome)]
    assert scores[0] == scores[1] and len(set(scores[0].values())) == 6
    assert [hash_tree(folder) for folder in pair] == before
    assert not (tmp_path / "out.pome-sweep/base").exists()


def test_after_a_candidate_that_cannot_be_made_the_next_one_is_whole(tmp_path):
    """In float16 a large beta overflows, after some tensors were written already."""
    base, _ = llama_pair(tmp_path, dtype=torch.float16)
    paths = [base, write_checkpoint(tmp_path / "far", perturb(read_tensors(base), 0.1), config=LLAMA)]
    kept = tmp_path / "kept"
    grid = make_grid({"layers": "ffn", "beta": "1,1e6,2"})
    outcome = sweep(*paths, tmp_path / "out", grid, make_scorer(score_cmd=keep_copies(kept)))
    (failed,) = [trial for trial in outcome.trials if trial.failed]
    assert failed.candidate.params["beta"] == 1e6 and "overflows float16" in failed.failed
    (last,) = [trial for trial in outcome.trials if trial.candidate and trial.candidate.params["beta"] == 2.0]
    edit(*paths, tmp_path / "plain", last.candidate.spec)
    assert int(last.score.scored.value) == checksum(tmp_path / "plain" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_sweep_repeats_no_candidate_and_ends_the_same(pair, tmp_path, seed):
    arguments = ["sweep", *map(str, pair), "OUT", "--rank-ratio", "0.25,0.5,1", "--beta", "1,2", "--write-best", "-q"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(out, log):
        given = [str(out) if argument == "OUT" else argument for argument in arguments]
        scorer = f"n=$({CHECKSUM}); echo {{model}} $n >> {log}; sleep 0.2; echo $n"
        command = [sys.executable, "-m", "pome", *given, "--score-cmd", scorer]
        return subprocess.Popen(command, env=environment())

    assert start(whole, tmp_path / "log-whole").wait(120) == 0
    dice, log = random.Random(seed), tmp_path / "log-killed"
    for _ in range(3):
        process = start(killed, log)
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        goal = min(7, seen + dice.randint(1, 3))
        while process.poll() is None and (len(log.read_text().splitlines()) if log.exists() else 0) < goal:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.4)
        process.kill()
        process.wait()
        time.sleep(0.5)  # a scorer that outlived its sweep ends
    assert start(killed, log).wait(120) == 0
    scored = [line.split()[1] for line in log.read_text().splitlines()]
    # A kill may come between a scorer's end and the line that says so: that one is scored again, no other.
    assert len(set(scored)) == 8 and len(scored) <= 8 + 3
    assert hash_tree(whole).keys() == hash_tree(killed).keys()
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert read_manifest(whole) | {"sweep": 0} == read_manifest(killed) | {"sweep": 0}
    scores = [[c["score"] for c in read_manifest(out)["sweep"]["candidates"]] for out in (whole, killed)]
    assert scores[0] == scores[1]
    assert not list(tmp_path.glob("*.pome-*"))


def test_an_interrupt_says_what_is_safe(pair, tmp_path):
    log = tmp_path / "log"
    command = f"echo x >> {log}; if [ $(wc -l < {log}) = 4 ]; then sleep 60; fi; {CHECKSUM}"
    arguments = ["sweep", *map(str, pair), str(tmp_path / "out"), "--beta", "1,2,3", "--score-cmd", command]
    process = subprocess.Popen(
        [sys.executable, "-m", "pome", *arguments], env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; 3 scores are safe in" in said and "run the same command again to go on" in said
    assert "Traceback" not in said


# --- Models in memory


def save_tokenizer(folder: Path) -> None:
    words = {"[UNK]": 0, "[BOS]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[BOS]", "pad_token": "[BOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def save_records(file: Path, seed: int = 0, count: int = 12) -> Path:
    dice = random.Random(seed)
    lines = []
    for i in range(count):
        words = dice.choices(WORDS, k=dice.randint(4, 16))
        half = len(words) // 2
        record = {"text": " ".join(words)} if i % 2 else {
            "prompt": " ".join(words[:half]), "completion": " " + " ".join(words[half:])
        }  # fmt: skip
        lines.append(json.dumps(record))
    file.write_text("\n".join(lines) + "\n")
    return file


def model_pair(folder: Path, class_name: str, model_type: str, dtype: torch.dtype = torch.float32) -> list[Path]:
    """[BASE, FT] of a tiny model with a tokenizer, as transformers saves them."""
    paths = []
    for name, seed in (("base", 0), ("ft", 7)):
        config = tiny_config(model_type, vocab_size=len(WORDS) + 2)
        model = tiny_model(class_name, config).to(dtype)
        if seed:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += (0.02 * torch.randn(weight.shape, generator=generator)).to(dtype)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
        paths.append(folder / name)
    return paths


def loss_by_hand(folder: Path, file: Path) -> tuple[float, list[float]]:
    """(mean token loss, loss of each record), one record at a time, by the model's own loss."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sums, counts = [], []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer(record.get("prompt", "") + record.get("completion", record.get("text", "")))["input_ids"]
        start = len(tokenizer(record["prompt"])["input_ids"]) if "prompt" in record else 1
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        counts.append(len(ids) - start)
        sums.append(float(loss) * counts[-1])
    return sum(sums) / sum(counts), [a / b for a, b in zip(sums, counts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("class_name", "model_type", "dtype"),
    [
        ("LlamaForCausalLM", "llama", torch.float32),
        ("LlamaForCausalLM", "llama", torch.bfloat16),
        ("GPT2LMHeadModel", "gpt2", torch.float32),
        ("MixtralForCausalLM", "mixtral", torch.float32),  # its experts are fused while it is loaded
        ("Phi3ForCausalLM", "phi3", torch.float32),
    ],
)
def test_the_loss_is_that_of_the_checkpoint_that_edit_writes(tmp_path, class_name, model_type, dtype):
    paths = model_pair(tmp_path, class_name, model_type, dtype)
    file = save_records(tmp_path / "data.jsonl")
    grid = make_grid({"layers": ["up", "ffn"], "beta": [1.0, 3.0]})
    outcome = sweep(*paths, tmp_path / "out", grid, make_scorer(loss=str(file), batch_size=5))
    assert not [trial.failed for trial in outcome.trials if trial.failed]
    for i, trial in enumerate(outcome.trials):
        folder = {"fine-tuned": paths[1], "base": paths[0]}.get(trial.label, tmp_path / f"plain-{i}")
        if trial.candidate:
            edit(*paths, folder, trial.candidate.spec)
        mean, examples = loss_by_hand(folder, file)
        assert trial.score.scored.value == pytest.approx(mean, rel=1e-5)
        assert trial.score.scored.examples == pytest.approx(examples, rel=1e-4)
    scores = [trial.score.scored.value for trial in outcome.trials if trial.candidate]
    assert scores == sorted(scores) and len(set(scores)) == 4  # less is better, and first


def test_training_data_choose_the_best_and_held_out_data_compare_it(tmp_path):
    paths = model_pair(tmp_path, "LlamaForCausalLM", "llama")
    held, train = save_records(tmp_path / "held.jsonl", 1), save_records(tmp_path / "train.jsonl", 2)
    scorer = make_scorer(loss=str(held), train_data=str(train))
    outcome = sweep(*paths, tmp_path / "out", make_grid({"beta": [0.5, 1.0, 4.0]}), scorer)
    tried = [trial for trial in outcome.trials if trial.candidate]
    assert outcome.best.key == min(tried, key=lambda trial: trial.score.train.value).key
    for trial in tried:
        edit(*paths, tmp_path / trial.key, trial.candidate.spec)
        assert trial.score.train.value == pytest.approx(loss_by_hand(tmp_path / trial.key, train)[0], rel=1e-5)
        assert trial.score.scored.value == pytest.approx(loss_by_hand(tmp_path / trial.key, held)[0], rel=1e-5)
    # Chosen without a look at the held-out data, the best needs no allowance for the choice among three.
    best = outcome.trials[0].difference
    spread = (best.best_interval[1] - best.best_interval[0]) / (best.interval[1] - best.interval[0])
    assert 0.7 < spread < 1.4


def test_an_adapter_is_swept_in_its_merged_form(tmp_path):
    base, _ = model_pair(tmp_path, "LlamaForCausalLM", "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what it is about to drop
        from peft import LoraConfig, get_peft_model

        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, lora)
        adapted.save_pretrained(tmp_path / "adapter")
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
    for folder in ("adapter", "merged"):
        save_tokenizer(tmp_path / folder)
    file = save_records(tmp_path / "data.jsonl")
    grid = make_grid({"rank_ratio": [0.5, 1.0]})
    outcome = sweep(base, tmp_path / "adapter", tmp_path / "out", grid, make_scorer(loss=str(file)))
    by_label = {trial.label: trial for trial in outcome.trials}
    mean, _ = loss_by_hand(tmp_path / "merged", file)
    assert by_label["fine-tuned"].score.scored.value == pytest.approx(mean, rel=1e-5)
    for trial in outcome.trials:
        if trial.candidate:
            edit(base, tmp_path / "adapter", tmp_path / trial.key, trial.candidate.spec)
            save_tokenizer(tmp_path / trial.key)
            assert trial.score.scored.value == pytest.approx(loss_by_hand(tmp_path / trial.key, file)[0], rel=1e-5)


def test_a_model_that_transformers_cannot_load_is_named(pair, tmp_path, capsys):
    file = save_records(tmp_path / "data.jsonl")
    arguments = ["sweep", *map(str, pair), str(tmp_path / "out"), "--loss", str(file)]
    assert run_command(arguments) == 1
    said = capsys.readouterr().err
    assert "the fine-tuned model has no score: transformers cannot load it" in said and "Traceback" not in said


@pytest.mark.parametrize("error", [RuntimeError(""), AttributeError("no such head"), TypeError("a\nb")], ids=repr)
def test_any_error_while_loading_a_model_is_a_score_error(tmp_path, monkeypatch, error):
    class Model(torch.nn.Module):
        def to(self, device):
            raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (Model(), {}))
    said = str(error).partition("\n")[0] or "RuntimeError"
    with pytest.raises(ScoreError, match=f"^transformers cannot load it: {said}$"):
        load_model(tmp_path, "cpu")


def change_weights(folder, change):
    """Rewrite a model's file without some weights, or with others."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("class_name", "change", "said"),
    [
        ("LlamaForCausalLM", lambda t: t.pop("lm_head.weight"), "its weight lm_head.weight is not in the checkpoint"),
        ("LlamaForCausalLM", lambda t: t.pop("model.norm.weight"), "model.norm.weight is not in the checkpoint"),
        ("LlamaForSequenceClassification", lambda t: None, "as a LlamaForCausalLM, its weight lm_head.weight is not"),
        ("LlamaModel", lambda t: None, "its weight lm_head.weight is not in the checkpoint"),
        ("LlamaForCausalLM", lambda t: t.update({"lm_head.weight": torch.ones(3, 32)}), "has another shape"),
    ],
)  # fmt: skip
def test_a_model_with_weights_that_the_library_makes_up_is_refused_before_any_score(
    tmp_path, capsys, class_name, change, said
):
    base, ft = model_pair(tmp_path, class_name, "llama")
    change_weights(ft, change)
    file = save_records(tmp_path / "data.jsonl")
    assert run_command(["sweep", str(base), str(ft), str(tmp_path / "out"), "--loss", str(file)]) == 1
    err = capsys.readouterr().err
    assert "the fine-tuned model has no score" in err and said in err
    assert "[2/" not in err
    assert not (tmp_path / "out").exists()


def test_a_base_with_a_weight_made_up_has_no_score_and_names_it(tmp_path):
    base, ft = model_pair(tmp_path, "LlamaForCausalLM", "llama")
    change_weights(base, lambda tensors: tensors.pop("lm_head.weight"))
    scorer = make_scorer(loss=str(save_records(tmp_path / "data.jsonl")))
    outcome = sweep(base, ft, tmp_path / "out", make_grid({}), scorer)
    (failed,) = [trial.failed for trial in outcome.trials if trial.label == "base"]
    assert "lm_head.weight is not in the checkpoint" in failed


def test_a_tied_head_that_is_not_stored_is_not_made_up(tmp_path):
    config = tiny_config("llama", vocab_size=len(WORDS) + 2, tie_word_embeddings=True)
    tiny_model("LlamaForCausalLM", config).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m/model.safetensors")
    load_model(tmp_path / "m", "cpu")


def test_an_adapter_beside_a_merged_model_is_not_scored(tmp_path):
    """What is scored are the weights; transformers would apply the adapter to them again."""
    base, ft = model_pair(tmp_path, "LlamaForCausalLM", "llama")
    file = save_records(tmp_path / "data.jsonl")
    scorer = make_scorer(loss=str(file))
    plain = sweep(base, ft, tmp_path / "plain", make_grid({}), scorer)
    for folder in (base, ft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT asks transformers for what it is about to drop
            from peft import LoraConfig, get_peft_model

            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
            get_peft_model(model, config).save_pretrained(folder)
    beside = sweep(base, ft, tmp_path / "beside", make_grid({}), scorer)
    for one, other in zip(plain.trials, beside.trials, strict=True):
        assert one.score.scored.value == pytest.approx(other.score.scored.value, rel=1e-6)


TASK = """\
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_the_harness_scores_a_local_task_without_a_network(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    from lm_eval import simple_evaluate

    paths = model_pair(tmp_path, "LlamaForCausalLM", "llama")
    dice = random.Random(0)
    rows = [
        {"question": " ".join(dice.choices(WORDS, k=5)), "choices": dice.sample(WORDS, 3), "answer": dice.randrange(3)}
        for _ in range(24)
    ]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "tiny_words.yaml"
    task.write_text(TASK.format(data=data))
    outcome = sweep(*paths, tmp_path / "out", make_grid({"beta": [1.0, 4.0]}), make_scorer(lm_eval=str(task)))
    assert not [trial.failed for trial in outcome.trials if trial.failed]
    for trial in outcome.trials:
        assert len(trial.score.scored.examples) == 24
        assert trial.score.metrics.keys() == {"tiny_words acc"}
    # The harness itself, on the checkpoint that edit writes, through its own loader.
    from lm_eval.tasks import TaskManager

    best = outcome.best
    edit(*paths, tmp_path / "plain", best.candidate.spec)
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'plain'},dtype=float32",
        tasks=["tiny_words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    assert best.score.scored.value == pytest.approx(found["results"]["tiny_words"]["acc,none"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "asked", "said"),
    [
        ("", "tiny_wrds.yaml", "/tiny_wrds.yaml"),
        ("metric: acc|metric: perplexity|higher_is_better: true|higher_is_better: false", "tiny_words.yaml",
         "lm-eval: of tiny_words, perplexity is better when lower; use --loss or --score-cmd for it"),
        ("words.jsonl|no.jsonl", "tiny_words.yaml", "lm-eval: FileNotFoundError: "),
    ],
)  # fmt: skip
def test_a_task_that_cannot_score_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, change, asked, said):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    data = tmp_path / "words.jsonl"
    data.write_text('{"question": "a", "choices": ["a", "b"], "answer": 0}\n')
    text = TASK.format(data=data)
    old_and_new = change.split("|")
    for old, new in zip(old_and_new[::2], old_and_new[1::2], strict=False):
        text = text.replace(old, new)
    (tmp_path / "tiny_words.yaml").write_text(text)
    monkeypatch.setattr("pome.sweeping.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    paths = model_pair(tmp_path, "LlamaForCausalLM", "llama")
    with pytest.raises(ScoreError) as caught:
        sweep(*paths, tmp_path / "out", make_grid({}), make_scorer(lm_eval=str(tmp_path / asked)))
    assert said in caught.value.args[0]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


# --- What people see, and batches


def test_the_result_as_table_page_and_plots(pair, tmp_path, capsys):
    told = (0.5, 0.4, 0.6, 0.7, 0.8, 0.2)
    scores = [{"score": s, "examples": [s - 0.1, s + 0.1], "metrics": {"f1": s / 2}} for s in told]
    answers, log = tmp_path / "answers", tmp_path / "log"
    answers.write_text("".join(json.dumps(score) + "\n" for score in scores))
    command = f"echo {{model}} >> {log}; sed -n $(wc -l < {log})p {answers}"
    page, table, plots = tmp_path / "page.html", tmp_path / "table.csv", tmp_path / "plots"
    arguments = ["sweep", *map(str, pair), str(tmp_path / "<b>out"), "--score-cmd", command, "--json"]
    arguments += ["--rank-ratio", "0.25,0.5", "--beta", "1,1.5"]
    assert run_command([*arguments, "--html", str(page), "--csv", str(table), "--plots", str(plots)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["written"] and found["beats_fine_tuned"]
    best = {"method": "equalize", "layers": ["up"], "rank_ratio": 0.5, "scale": "frobenius", "beta": 1.0, "power": 0.0}
    assert found["best"]["params"] == best
    assert [round(c["score"], 1) for c in found["candidates"]] == [0.8, 0.7, 0.6, 0.2, 0.5, 0.4]
    assert found["candidates"][0]["delta"] == pytest.approx(0.3)
    assert found["candidates"][0]["interval"] == pytest.approx([0.3, 0.3])
    assert found["candidates"][0]["metrics"] == {"f1": 0.4}
    assert "K=0.25" in captured.err and "Best of 4: up K=0.5 frobenius beta=1" in captured.err
    lines = table.read_text().splitlines()
    assert lines[0] == "model,score,difference,95 % interval,f1" and len(lines) == 7
    assert lines[1].startswith("up K=0.5 frobenius beta=1,0.8,+0.3,")
    assert sorted(path.name for path in plots.iterdir()) == ["sweep_1.png", "sweep_1.svg"]
    dom = open_page(page, 400, 900)
    assert dom.count("<tr") == 3 + 7 and "beta 1.5" in dom
    assert "<b>out" not in dom and "&lt;b&gt;out" in dom
    assert "://" not in page.read_text() and "<script" not in page.read_text()


BATCH = """\
variables: {tuned: null, betas: 1}
defaults:
  base: base
  fine_tuned: ${tuned}
  command: sweep
  score_cmd: "echo {model} >> log; cksum < {model}/model.safetensors"
jobs:
  - {name: first, out: one, beta: [1, 2], rank_ratio: [0.5, 1], write_best: true}
  - name: second
    out: two
    layers: [up, [gate, down]]
    beta: ${betas}
    write_best: true
  - name: third
    out: three
    command: edit
    beta: ${betas}
"""


def test_a_batch_runs_sweeps_with_variables_and_resumes_what_is_left(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in pair:
        os.utime(folder / "model.safetensors", (1e9, 1e9))
    Path("jobs.yaml").write_text(BATCH.partition("  - name: third")[0])
    assert run_command(["batch", "jobs.yaml"]) == 2
    assert "jobs.yaml:4: the variable 'tuned' has no value; give --set tuned=VALUE" in capsys.readouterr().err
    assert run_command(["batch", "jobs.yaml", "--set", "tuned=ft", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["jobs"]
    assert [job["status"] for job in found] == ["done", "done"]
    assert len(found[0]["sweep"]["candidates"]) == 6 and len(found[1]["sweep"]["candidates"]) == 4
    count = len(Path("log").read_text().splitlines())
    assert count == 10
    assert run_command(["batch", "jobs.yaml", "--set", "tuned=ft", "--json"]) == 0
    assert len(Path("log").read_text().splitlines()) == count
    assert read_manifest(Path("two"))["sweep"]["grid"]["layers"] == [["up"], ["gate", "down"]]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (BATCH, ["--set", "tund=ft"], "no variable is named 'tund'; did you mean 'tuned'"),
        (BATCH, ["--set", "tuned"], "--set tuned: write NAME=VALUE"),
        (f"{BATCH}    loss: data\n", ["--set", "tuned=ft"], "loss: the command edit does not take that; sweep may"),
        (BATCH.replace("${betas}", "${beta}"), ["--set", "tuned=ft"], "jobs.yaml:12: no variable is named 'beta'"),
        ("jobs: [{base: a, fine_tuned: b, out: c, beta: [1, 2]}]", [], "beta: [1, 2] is not a number"),
        ("jobs: [{command: sweep, base: a, fine_tuned: b, out: c}]", [], "nothing to score with"),
        ("variables: [a]\njobs: []", [], "variables: expected 'name: text' lines"),
    ],
)
def test_a_wrong_batch_of_sweeps_is_refused_by_line(tmp_path, monkeypatch, capsys, text, options, said):
    monkeypatch.chdir(tmp_path)
    Path("jobs.yaml").write_text(text)
    assert run_command(["batch", "jobs.yaml", *options]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.yaml"]


def test_a_sweep_checks_the_disk_for_its_decompositions_and_copies(pair, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr("pome.output.staging.can_share", lambda *_: False)
    with pytest.raises(PomeError, match="are needed and 1.0 MB are free"):
        sweep(*pair, tmp_path / "out", make_grid({}), make_scorer(score_cmd="echo 1; : {model}"))


def test_the_models_weights_are_finite_numbers_of_the_reference(tmp_path):
    """The check above compares with edit; this one with float64 arithmetic, so that both cannot be wrong together."""
    paths = llama_pair(tmp_path)
    kept = tmp_path / "kept"
    outcome = sweep(*paths, tmp_path / "out", make_grid({"beta": [1.4]}), make_scorer(score_cmd=keep_copies(kept)))
    (trial,) = [trial for trial in outcome.trials if trial.candidate]
    made = load_file(kept / f"{int(trial.score.scored.value)}")
    base, ft = (read_tensors(path) for path in paths)
    for name in (name for name in base if "up_proj" in name):
        D = ft[name].double() - base[name].double()
        U, s, Vh = torch.linalg.svd(D, full_matrices=False)
        k = round(0.5 * int((s > s[0] * math.sqrt(max(D.shape) * 2.0**-52)).sum()))
        wanted = base[name].double() + 1.4 * float(D.norm()) / math.sqrt(k) * U[:, :k] @ Vh[:k]
        torch.testing.assert_close(made[name].double(), wanted, rtol=1e-6, atol=1e-8)
