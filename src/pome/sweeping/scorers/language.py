"""Scorers of a causal language model in memory: the loss on a file of records, and lm-eval's tasks."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pome.checkpoint.hashing import hash_file
from pome.config.options import nearest
from pome.errors import ScoreError, SpecError, printable
from pome.sweeping.scorers.base import Score, Scored, is_mean, read_finite

MAX_TOKENS = 2048  # of one record; what is longer is cut, as in most training
LOGIT_BYTES = 256 << 20  # of one batch's logits in float32: the bound on memory beyond the model's own
EVAL_EXTRA = "run: pip install 'pome-edit[eval]'"


def load_model(folder: Path, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) by transformers, ready to be scored on `device`: float32 on a CPU, else as stored.

    No code that a checkpoint brings is run. Raises ScoreError, also where a weight of the model is not in the
    checkpoint: the library would make it up, and every load of the same files would score differently.
    """
    try:
        import transformers
    except ImportError:
        raise ScoreError(f"transformers is not installed; {EVAL_EXTRA}") from None
    library: Any = transformers
    kind = "float32" if device == "cpu" else "auto"
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, info = library.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True
        )
        refuse_made_up(model, info)
        return model.to(device).eval(), tokenizer
    except ScoreError:
        raise
    except Exception as error:  # a config may bring it to raise anything, and a device may have too little memory
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ScoreError(f"transformers cannot load it: {printable(said[0])}") from None


def refuse_made_up(model: Any, info: Mapping[str, Any]) -> None:
    """Raise ScoreError naming a weight that transformers did not load: missing, of another shape, or failed.

    `info` is what `from_pretrained` returns with `output_loading_info`. A missing weight that is tied to a loaded one
    is not made up.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    missing = set(info.get("missing_keys", ()))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    lost = sorted(name for name in missing if id(tensors.get(name)) not in loaded)
    other = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys", ()))
    errors = [str(item) for item in info.get("error_msgs", ())]
    for names, what in ((lost, "is not in the checkpoint"), (other, "has another shape in the checkpoint")):
        if names:
            more = f" ({len(names)} weights in all)" if len(names) > 1 else ""
            raise ScoreError(
                f"as a {type(model).__name__}, its weight {printable(names[0])} {what}{more}, and transformers would "
                "make it up at random; score it with --score-cmd, or give a causal language model"
            )
    if errors:
        raise ScoreError(f"transformers cannot load it: {printable(errors[0])}")


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
        return {key: hash_file(path)[1] if path else None for key, path in named.items()}

    def score_model(self, model: Any, tokenizer: Any) -> Score:
        scored = measure_loss(model, tokenizer, self.file, self.batch_size)
        train = measure_loss(model, tokenizer, self.train_data, self.batch_size) if self.train_data else None
        return Score(scored, train)


def read_records(path: Path) -> list[tuple[str | None, str]]:
    """(prompt or None, text) of every line. Raises SpecError naming the line."""
    try:
        lines = path.read_text("utf-8").split("\n")
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
    # Where both do not fit, the end of the prompt is kept: the completion answers it.
    before = before[max(0, len(before) + len(after) - MAX_TOKENS) :] if len(after) < MAX_TOKENS else before[-1:]
    return (before + after)[:MAX_TOKENS], max(1, len(before))


@dataclass(frozen=True)
class HarnessScorer:
    """The mean over tasks of EleutherAI's lm-eval, each by its first metric that is better when higher.

    `tasks` are names, or files of tasks.
    """

    tasks: tuple[str, ...]
    batch_size: int = 8
    limit: int | None = None  # examples of each task
    minimize: bool = False

    def describe(self) -> dict[str, Any]:
        files = {task: hash_file(Path(task))[1] for task in self.tasks if Path(task).is_file()}
        return {"lm_eval": list(self.tasks), "task_files": files, "limit": self.limit}

    def prepare(self) -> None:
        """Find every task and its metrics before a model is loaded. Raises ScoreError for a task that cannot score."""
        names = self._name_tasks()
        with explained_errors():
            manager = _index_tasks(self.tasks)
            for name in names:
                if name not in manager.all_tasks:
                    raise ScoreError(f"lm-eval has no task {printable(name)}{nearest(name, manager.all_tasks)}")
            tasks = manager.load(names)["tasks"]
            for name in names:
                if name in tasks:  # whether a group has a metric is in its results alone
                    find_metric(name, tasks[name].aggregation(), tasks[name].higher_is_better())

    def _name_tasks(self) -> list[str]:
        return [Path(task).stem if Path(task).is_file() else task for task in self.tasks]

    def score_model(self, model: Any, tokenizer: Any) -> Score:
        names = self._name_tasks()
        with explained_errors():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=list(names),
                task_manager=_index_tasks(self.tasks),
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        return read_harness(found, names)


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Errors of lm-eval and its tasks as a ScoreError: their code may raise anything, and the sweep goes on."""
    try:
        yield
    except ScoreError:
        raise
    except ImportError:
        raise ScoreError(f"lm-eval is not installed; {EVAL_EXTRA}") from None
    except Exception as error:  # a task's code may raise anything
        raise ScoreError(f"lm-eval: {type(error).__name__}: {printable(str(error))}") from None


def find_metric(task: str, metrics: Iterable[str], higher_is_better: Mapping[str, bool]) -> str:
    """The first metric of a task that is better when higher. Raises ScoreError where it has none."""
    shorts = {metric.split(",")[0]: metric for metric in metrics}
    for short, metric in shorts.items():
        if higher_is_better.get(short) is not False:
            return metric
    if shorts:
        said = f"of {printable(task)}, {' and '.join(shorts)} is better when lower; use --loss or --score-cmd for it"
    else:
        said = f"the task {printable(task)} has no metric of its own; name its parts"
    raise ScoreError(f"lm-eval: {said}")


@functools.lru_cache(maxsize=4)
def _index_tasks(tasks: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks: those beside the files named, and its own where a name asks for them. It takes some
    seconds to make."""
    from lm_eval.tasks import TaskManager

    folders = sorted({str(Path(task).resolve().parent) for task in tasks if Path(task).is_file()})
    return TaskManager(include_path=folders or None, include_defaults=not all(Path(t).is_file() for t in tasks))


def read_harness(found: Mapping[str, Any], names: Sequence[str]) -> Score:
    """The score in what `lm_eval.simple_evaluate` returns. Raises ScoreError where a task has no usable metric."""
    values: list[float] = []
    examples: list[float] = []
    weights: list[float] = []
    metrics: dict[str, float] = {}
    for name in names:
        results = found["results"].get(name, {})
        metrics_of_it = [key for key in results if "," in key and not key.split(",")[0].endswith("_stderr")]
        metric = find_metric(name, metrics_of_it, found.get("higher_is_better", {}).get(name, {}))
        short = metric.split(",")[0]
        value = read_finite(results[metric], f"{name} {metric}")
        values.append(value)
        metrics[f"{name} {short}"] = value
        rows = [sample.get(short) for sample in found.get("samples", {}).get(name, ())]
        if all(isinstance(row, (int, float)) and math.isfinite(row) for row in rows):
            examples += [float(row) for row in rows if row is not None]
            weights += [1.0 / (len(rows) * len(names))] * len(rows)
    value = sum(values) / len(values)
    if not is_mean(value, examples, weights):
        return Score(Scored(value), metrics=metrics)
    return Score(Scored(value, tuple(examples), tuple(weights)), metrics=metrics)
