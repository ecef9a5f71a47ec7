"""Scorers: what a checkpoint is worth. A command of the user's, the loss on a file of records, or lm-eval's tasks.

A scorer sees a model, never a candidate: it does not know what was edited. ScoreError says why there is no score.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pome.checkpoint.clone import hash_file
from pome.errors import ScoreError, SpecError, printable

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)(?![\w.]*\w)", re.I)
MOST_OUTPUT = 64 << 20  # bytes of a command's output that are looked at, from the end
MAX_TOKENS = 2048  # of one record; what is longer is cut, as in most training
LOGIT_BYTES = 256 << 20  # of one batch's logits in float32: the bound on memory beyond the model's own
EVAL_EXTRA = "run: pip install 'pome-edit[eval]'"


@dataclass(frozen=True)
class Scored:
    """One number and, where the scorer gives them, what it is the weighted mean of: an entry for each example."""

    value: float
    examples: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None  # None: all alike


@dataclass(frozen=True)
class Score:
    """What one model got. `train` is the same on the training data, where the choice is made by that."""

    scored: Scored
    train: Scored | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """minimize: less is better. describe: what two sweeps must share for their scores to be the same."""

    @property
    def minimize(self) -> bool: ...

    def describe(self) -> dict[str, Any]: ...


class FolderScorer(Scorer, Protocol):
    """Scores a checkpoint on disk."""

    def score_folder(self, path: Path) -> Score: ...


class ModelScorer(Scorer, Protocol):
    """Scores a transformers model in memory."""

    def score_model(self, model: Any, tokenizer: Any) -> Score: ...


@dataclass(frozen=True)
class CommandScorer:
    """`command` run by the shell with {model} replaced; its last number counts, or JSON with `score`.

    JSON may hold `examples` (a number for each example, of which the score is the mean), `weights` of them, and
    `metrics`, other numbers to be shown. `timeout` is in seconds.
    """

    command: str
    minimize: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if "{model}" not in self.command:
            raise SpecError(f"score_cmd: {printable(self.command)!r} has no {{model}}; write 'CMD {{model}}'")

    def describe(self) -> dict[str, Any]:
        return {"score_cmd": self.command, "minimize": self.minimize}

    def score_folder(self, path: Path) -> Score:
        line = self.command.replace("{model}", shlex.quote(str(path)))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # A session of its own, so that a command that hangs is ended with all that it started.
            process = subprocess.Popen(
                line, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
            try:
                status = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise ScoreError(f"the command took longer than {self.timeout:g} seconds") from None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status:
                last = _read_end(err).strip().splitlines()[-1:] or [""]
                ended = f"was ended by signal {-status}" if status < 0 else f"left with exit status {status}"
                raise ScoreError(f"the command {ended}: {printable(last[0])}".rstrip(": "))
            return read_score(_read_end(out))


def _read_end(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MOST_OUTPUT))
    return file.read().decode("utf-8", "replace")


def read_score(text: str) -> Score:
    """The score in what a command printed. Raises ScoreError when there is none, or it is no finite number."""
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (text, lines[-1] if lines else ""):
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return _read_object(found)
    numbers = NUMBER.findall(text)
    if not numbers:
        raise ScoreError("the command printed no number")
    return Score(Scored(_finite(float(numbers[-1]), "the score")))


def _read_object(found: Mapping[str, Any]) -> Score:
    if "score" not in found:
        raise ScoreError("the command printed JSON without 'score'")
    value = _finite(found["score"], "the score")
    examples, weights = (
        tuple(_finite(item, key) for item in _as_list(found[key], key)) if found.get(key) is not None else None
        for key in ("examples", "weights")
    )
    metrics = found.get("metrics") or {}
    if not isinstance(metrics, dict):
        raise ScoreError("the command printed 'metrics' that are no object")
    named = {str(key): _finite(item, f"metrics.{key}") for key, item in metrics.items()}
    if examples is not None and not _is_mean(value, examples, weights):
        # Resampling them would tell of another number than the score: better no interval than a wrong one.
        examples = weights = None
    return Score(Scored(value, examples, weights if examples is not None else None), metrics=named)


def _as_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ScoreError(f"the command printed {what!r} that are no list")
    return value


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ScoreError(f"{printable(what)} is {printable(str(value))}, not a finite number")
    return float(value)


def _is_mean(value: float, examples: Sequence[float], weights: Sequence[float] | None) -> bool:
    weights = weights or [1.0] * len(examples)
    if not examples or len(weights) != len(examples) or min(weights) < 0.0 or sum(weights) <= 0.0:
        return False
    mean = sum(w * x for w, x in zip(weights, examples, strict=True)) / sum(weights)
    return math.isclose(value, mean, rel_tol=1e-4, abs_tol=1e-9)


def load_model(folder: Path, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) by transformers, ready to be scored on `device`: float32 on a CPU, else as stored.

    No code that a checkpoint brings is run. Raises ScoreError.
    """
    try:
        import transformers
    except ImportError:
        raise ScoreError(f"transformers is not installed; {EVAL_EXTRA}") from None
    library: Any = transformers
    kind = "float32" if device == "cpu" else "auto"
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = library.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=kind)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ScoreError(f"transformers cannot load it: {printable(str(error).strip().splitlines()[0])}") from None
    return model.to(device).eval(), tokenizer


@dataclass(frozen=True)
class LossScorer:
    """Mean loss of a token, in nats, over the records of a JSON-lines file: {"prompt", "completion"} or {"text"}.

    Of a completion only its tokens count. With `train_data`, another such file, the choice is made by that.
    """

    file: Path
    train_data: Path | None = None
    batch_size: int = 8
    minimize: bool = True

    def __post_init__(self) -> None:
        for path in filter(None, (self.file, self.train_data)):
            read_records(path)

    def describe(self) -> dict[str, Any]:
        named = {"loss": self.file, "train_data": self.train_data}
        return {key: hash_file(path, lambda _: None)[1] if path else None for key, path in named.items()}

    def score_model(self, model: Any, tokenizer: Any) -> Score:
        scored = measure_loss(model, tokenizer, self.file, self.batch_size)
        train = measure_loss(model, tokenizer, self.train_data, self.batch_size) if self.train_data else None
        return Score(scored, train)


def read_records(path: Path) -> list[tuple[str | None, str]]:
    """(prompt or None, text) of every line. Raises SpecError naming the line."""
    try:
        lines = path.expanduser().read_text("utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise SpecError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    records: list[tuple[str | None, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise SpecError(f"{path}:{number}: not JSON; each line is one object") from None
        keys = ("prompt", "completion") if isinstance(found, dict) and "prompt" in found else ("text",)
        if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in keys):
            raise SpecError(f'{path}:{number}: neither {{"prompt": ..., "completion": ...}} nor {{"text": ...}}')
        records.append((found["prompt"], found["completion"]) if len(keys) == 2 else (None, found["text"]))
    if not records:
        raise SpecError(f"{path}: holds no record")
    return records


def measure_loss(model: Any, tokenizer: Any, path: Path, batch_size: int) -> Scored:
    """Mean token loss over a file; an example is one record, its weight the number of its tokens that count.

    Records go in order of length, so that little is padding, and in batches whose logits stay under LOGIT_BYTES.
    Raises ScoreError for a record of which no token can be predicted, and for a loss that is not finite.
    """
    import torch

    rows = [_tokenize(tokenizer, prompt, text) for prompt, text in read_records(path)]
    for number, (ids, start) in enumerate(rows, 1):
        if len(ids) <= start:
            raise ScoreError(f"{path}: record {number} has no token to predict")
    vocabulary = model.get_output_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    losses, counts = [0.0] * len(rows), [0] * len(rows)
    at = 0
    while at < len(order):
        length = len(rows[order[at]][0])
        batch = order[at : at + max(1, min(batch_size, LOGIT_BYTES // (4 * length * vocabulary)))]
        at += len(batch)
        padded = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for row, i in enumerate(batch):
            tokens, _ = rows[i]
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        padded, mask = padded.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
            for row, i in enumerate(batch):
                tokens, start = rows[i]
                asked = slice(start, len(tokens))  # the token at t is predicted by the logits at t - 1
                predicted = logits[row, start - 1 : len(tokens) - 1].float()
                loss = torch.nn.functional.cross_entropy(predicted, padded[row, asked], reduction="sum")
                losses[i], counts[i] = float(loss), len(tokens) - start
    if not all(map(math.isfinite, losses)):
        bad = next(number for number, loss in enumerate(losses, 1) if not math.isfinite(loss))
        raise ScoreError(f"{path}: the loss of record {bad} is not finite")
    examples = tuple(loss / count for loss, count in zip(losses, counts, strict=True))
    return Scored(sum(losses) / sum(counts), examples, tuple(map(float, counts)))


def _tokenize(tokenizer: Any, prompt: str | None, text: str) -> tuple[list[int], int]:
    """Token ids, at most MAX_TOKENS, and the first position whose token is to be predicted."""
    if prompt is None:
        return list(tokenizer(text)["input_ids"])[:MAX_TOKENS], 1
    before = list(tokenizer(prompt)["input_ids"])
    after = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Where both do not fit, the end of the prompt is the part that the completion answers.
    before = before[max(0, len(before) + len(after) - MAX_TOKENS) :] if len(after) < MAX_TOKENS else before[-1:]
    return (before + after)[:MAX_TOKENS], max(1, len(before))


@dataclass(frozen=True)
class HarnessScorer:
    """The mean over tasks of EleutherAI's lm-eval, each by its first metric. `tasks` are names, or files of tasks."""

    tasks: tuple[str, ...]
    batch_size: int = 8
    limit: int | None = None  # examples of each task
    minimize: bool = False

    def describe(self) -> dict[str, Any]:
        files = {task: hash_file(Path(task), lambda _: None)[1] for task in self.tasks if Path(task).is_file()}
        return {"lm_eval": list(self.tasks), "task_files": files, "limit": self.limit}

    def score_model(self, model: Any, tokenizer: Any) -> Score:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ScoreError(f"lm-eval is not installed; {EVAL_EXTRA}") from None
        folders = [str(Path(task).resolve().parent) for task in self.tasks if Path(task).is_file()]
        names = [Path(task).stem if Path(task).is_file() else task for task in self.tasks]
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=list(names),
                task_manager=TaskManager(include_path=folders or None),
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        except Exception as error:  # a task may raise anything: its code is not ours, and the sweep goes on
            raise ScoreError(f"lm-eval: {type(error).__name__}: {printable(str(error))}") from None
        return read_harness(found, names)


def make_scorer(
    *,
    score_cmd: str | None = None,
    loss: str | None = None,
    lm_eval: str | Sequence[str] | None = None,
    train_data: str | None = None,
    minimize: bool = False,
    score_timeout: float | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> FolderScorer | ModelScorer:
    """The scorer of the options by name; exactly one of the first three must be given. Raises SpecError."""
    given = [name for name, value in (("score_cmd", score_cmd), ("loss", loss), ("lm_eval", lm_eval)) if value]
    if len(given) != 1:
        said = f"{' and '.join(given)} exclude each other" if given else "nothing to score with"
        raise SpecError(f"{said}; give one of score_cmd, loss and lm_eval")
    for name, value, needs in (
        ("minimize", minimize, "score_cmd"),
        ("score_timeout", score_timeout, "score_cmd"),
        ("train_data", train_data, "loss"),
        ("limit", limit, "lm_eval"),
    ):
        if value and given != [needs]:
            raise SpecError(f"{name}: goes with {needs}, not with {given[0]}")
    for name, count in (("batch_size", batch_size), ("limit", limit)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise SpecError(f"{name}: {count!r} is not a whole number of at least 1")
    if score_cmd:
        if score_timeout is not None and not (isinstance(score_timeout, (int, float)) and score_timeout > 0):
            raise SpecError(f"score_timeout: {score_timeout!r} is not a number of seconds above 0")
        return CommandScorer(score_cmd, minimize, score_timeout)
    if loss:
        train = Path(train_data).expanduser() if train_data else None
        return LossScorer(Path(loss).expanduser(), train, batch_size)
    names = [lm_eval] if isinstance(lm_eval, str) else list(lm_eval or ())
    tasks = tuple(task.strip() for name in names for task in name.split(",") if task.strip())
    return HarnessScorer(tasks, batch_size, limit)


def read_harness(found: Mapping[str, Any], names: Sequence[str]) -> Score:
    """The score in what `lm_eval.simple_evaluate` returns. Raises ScoreError where a task has no usable metric."""
    values: list[float] = []
    examples: list[float] = []
    weights: list[float] = []
    metrics: dict[str, float] = {}
    for name in names:
        results = found["results"].get(name, {})
        metric = next((key for key in results if "," in key and not key.split(",")[0].endswith("_stderr")), None)
        if metric is None:
            raise ScoreError(f"lm-eval: the task {printable(name)} has no metric of its own; name its parts")
        short = metric.split(",")[0]
        if found.get("higher_is_better", {}).get(name, {}).get(short) is False:
            raise ScoreError(f"lm-eval: of {printable(name)}, {short} is better when lower; use --score-cmd for it")
        value = _finite(results[metric], f"{name} {metric}")
        values.append(value)
        metrics[f"{name} {short}"] = value
        rows = [sample.get(short) for sample in found.get("samples", {}).get(name, ())]
        if all(isinstance(row, (int, float)) and math.isfinite(row) for row in rows):
            examples += [float(row) for row in rows if row is not None]
            weights += [1.0 / (len(rows) * len(names))] * len(rows)
    value = sum(values) / len(values)
    if not _is_mean(value, examples, weights):
        return Score(Scored(value), metrics=metrics)
    return Score(Scored(value, tuple(examples), tuple(weights)), metrics=metrics)
