"""Bases and their fine-tunes: one loop (completion loss, cosine, AdamW of the paper's recipe scaled down), cached.

Two small Llamas (3.9M and 12.3M parameters) and a small mixture of experts are pretrained here on a dictionary;
SmolLM2-135M comes as it is published, in 4 bits. All bases are rounded to bfloat16 once, published checkpoints are.
Products run in bfloat16 autocast.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pome.poet import Merger, PoetConfig, parameter_groups, unwrap, wrap
from real_weights import smollm2
from study.data import VOCABULARY, Example, Row, State, folder, load_tokenizer, read_text, split_task, tokenize
from study.experts import make_mixture
from study.reward import train_by_reward
from train_poet import make_optimizers, make_plan, run_step, scale_rates

LENGTH, WINDOWS = 128, 16  # of pretraining: tokens a window, windows a step
PRETRAIN_RATE = 2e-3
# Examples to train on and held out, by base and task.
LLAMA_SIZES = {"sums": (1200, 200), "records": (600, 150), "sentiment": (1000, 250), "definitions": (600, 200)}
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-4m": LLAMA_SIZES,
    "llama-12m": LLAMA_SIZES,
    "moe-8m": LLAMA_SIZES,
    "smollm2-135m": {"sums": (400, 150), "sentiment": (320, 150), "definitions": (320, 150)},
    "quick": {"sums": (80, 32)},
}


@dataclass(frozen=True)
class Own:
    """A base of the study's own, a Llama or a mixture of experts, and how many steps it is pretrained."""

    width: int
    layers: int
    steps: int
    text: str = "dictionary"
    mixture: bool = False


OWN = {
    "llama-4m": Own(256, 4, 300),
    "llama-12m": Own(384, 6, 1500),
    "moe-8m": Own(256, 4, 600, mixture=True),
    "quick": Own(64, 2, 40, "docs"),
}


@dataclass(frozen=True)
class Tuning:
    """A way to fine-tune. rate is that of the small Llama; `passes` over `share` of the examples, `batch` a step."""

    method: str = "adamw"
    rate: float = 1e-3
    passes: int = 3
    share: float = 1.0
    batch: int = 16
    dtype: str = "float32"
    neftune: float = 0.0
    ema: float = 0.0


TUNINGS = {
    "adamw": Tuning(),
    "adamw-short": Tuning(rate=2e-4, passes=1),
    "adamw-long": Tuning(passes=15, share=0.2),
    "adamw-full": Tuning(passes=12),
    "bf16": Tuning(dtype="bfloat16"),
    "adamw-low": Tuning(rate=3e-4),
    "adamw-high": Tuning(rate=3e-3),
    "bf16-low": Tuning(rate=3e-4, dtype="bfloat16"),
    "bf16-high": Tuning(rate=3e-3, dtype="bfloat16"),
    "muon": Tuning("muon"),
    "lora": Tuning("lora", rate=5e-3),
    "poet": Tuning("poet-bs", rate=4e-3),
    "neftune": Tuning(neftune=5.0),
    "ema": Tuning(ema=0.98),
    "soap": Tuning("soap"),
    "reward": Tuning("reward", rate=1e-4),
}
STARTS = {"reward": "adamw"}  # what goes on from another fine-tune: that one is the base of its pair
# SmolLM2 has its own rates: a large pretrained model takes smaller steps.
RATE_FACTOR = {"llama-4m": 1.0, "llama-12m": 1.0, "moe-8m": 1.0, "smollm2-135m": 0.1, "quick": 1.0}


@dataclass(frozen=True)
class Base:
    """A causal language model before fine-tuning."""

    model: Any
    encode: Callable[[str], list[int]]
    end: int
    text: str = "dictionary"  # whose held-out end shows what is forgotten

    def rows(self, examples: list[Example]) -> list[Row]:
        """Ids and labels; only the completion and the end after it are learnt."""
        found = []
        for example in examples:
            prompt, answer = self.encode(example.prompt), [*self.encode(example.completion), self.end]
            found.append((prompt + answer, [-100] * len(prompt) + answer))
        return found


def make_hash(*facts: object) -> str:
    """Name of something by all that it was made from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def save_whole(state: State, path: Path) -> None:
    """Write under another name and rename, so that a killed run leaves no half of a file."""
    fresh = path.with_suffix(f".{os.getpid()}.new")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, fresh)
    fresh.rename(path)


def make_llama(seed: int, width: int, layers: int) -> Any:
    """A Llama with random weights; its vocabulary is that of the study's tokenizer, its head tied."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def make_own(own: Own) -> Any:
    """A base of the study's own with random weights."""
    if own.mixture:
        return make_mixture(0, own.width, own.layers, VOCABULARY)
    return make_llama(0, own.width, own.layers)


def pretrain(own: Own) -> Path:
    """Pretrained weights of a base of the study's own, on random windows of a text. Cached."""
    steps = own.steps
    kind = ("mixture",) if own.mixture else ()
    path = (
        folder() / f"base-{make_hash(own.width, own.layers, steps, PRETRAIN_RATE, WINDOWS, LENGTH, *kind)}.safetensors"
    )
    if path.exists():
        return path
    tokens = tokenize(load_tokenizer(own.text), read_text(own.text)[0][: steps * WINDOWS * LENGTH * 3])
    model = make_own(own).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        scale_rates([optimizer], step, steps, max(1, steps // 20))
        starts = torch.randint(len(tokens) - LENGTH - 1, (WINDOWS,), generator=generator).tolist()
        batch = torch.stack([tokens[at : at + LENGTH + 1] for at in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"pretraining, step {step}: loss {loss.item():.3f}", flush=True)
    save_whole({name: p.detach() for name, p in model.named_parameters()}, path)
    return path


def load_base(name: str) -> Base:
    """One of OWN (`quick` is tiny and hardly trained) or `smollm2-135m`, in float32 rounded to bfloat16."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == "smollm2-135m":
        model = transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        slow = transformers.AutoTokenizer.from_pretrained(smollm2())
        return Base(model.eval(), lambda text: slow(text, add_special_tokens=False)["input_ids"], slow.eos_token_id)
    own = OWN[name]
    model = make_own(own)
    weights = load_file(pretrain(own))
    put(model, {name: tensor.bfloat16().float() for name, tensor in weights.items()})
    tokenizer = load_tokenizer(own.text)
    return Base(model.eval(), lambda given: tokenizer.encode(given).ids, 0, own.text)


def take(model: nn.Module) -> State:
    """All parameters by name, in float32; a tied head once."""
    return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def put(model: nn.Module, state: State) -> None:
    """Set parameters by name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])


def load_data(base_name: str, base: Base, task: str) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and held-out ones."""
    train, test = split_task(task, *SIZES[base_name][task])
    return base.rows(train), base.rows(test)


def list_facts(base_name: str, task: str, tuning_name: str, seed: int) -> tuple[object, ...]:
    """All that a fine-tune is made from."""
    steps = OWN[base_name].steps if base_name in OWN else None
    tuning = asdict(TUNINGS[tuning_name])
    return base_name, task, SIZES[base_name][task], tuning, RATE_FACTOR[base_name], seed, steps


def find_start(base_name: str, base: Base, task: str, tuning_name: str, seed: int) -> State:
    """Weights that a way of fine-tuning starts from: the base's, or another fine-tune's."""
    if tuning_name in STARTS:
        return fine_tune(base_name, base, task, STARTS[tuning_name], seed)
    return take(base.model)


def fine_tune(base_name: str, base: Base, task: str, tuning_name: str, seed: int) -> State:
    """Weights after fine-tuning, as they would be stored. Cached; `base.model` is left with the base's weights."""
    tuning = TUNINGS[tuning_name]
    path = folder() / f"tuned-{make_hash(*list_facts(base_name, task, tuning_name, seed))}.safetensors"
    if not path.exists():
        before = take(base.model)
        rows = load_data(base_name, base, task)[0]
        try:
            put(base.model, find_start(base_name, base, task, tuning_name, seed))
            tuned = train(base.model, rows[: round(tuning.share * len(rows))], tuning, base_name, seed)
        finally:
            put(base.model, before)
        save_whole(tuned, path)
    return load_file(path)


def train(model: Any, rows: list[Row], tuning: Tuning, base_name: str, seed: int) -> State:
    """The loop; the model's weights are changed, and its form is what it was."""
    torch.manual_seed(seed)
    rate, poet = tuning.rate * RATE_FACTOR[base_name], tuning.method.startswith("poet")
    if tuning.method == "reward":
        train_by_reward(model, rows, rate, seed)
        model.eval().zero_grad(set_to_none=True)
        return take(model)
    if tuning.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    plain, merger = model, None
    if tuning.method == "lora":
        import peft

        adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapter)
    if poet:
        wrap(model, PoetConfig(block_size=64, seed=seed))
    if tuning.method == "lora":
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
        ]
    elif poet:
        optimizers = [torch.optim.AdamW(parameter_groups(model, lr=rate / 4, poet_lr=rate, weight_decay=0.0))]
    elif tuning.method == "soap":
        from pytorch_optimizer import SOAP

        sides = {"precondition_frequency": 10, "max_precondition_dim": VOCABULARY - 1}  # not that of the vocabulary
        optimizers = [SOAP(model.parameters(), lr=rate, betas=(0.95, 0.95), weight_decay=0.0, **sides)]
    else:
        optimizers = make_optimizers(model, tuning.method, lr=rate, matrix_lr=rate)
    plan = make_plan(len(rows), tuning.batch, tuning.passes, seed)
    merger = Merger(model, optimizers, every=max(10, len(plan) // 5)) if poet else None
    average: State = {}
    model.train()
    with noisy_embeddings(plain, tuning.neftune):
        for step, numbers in enumerate(plan):
            scale_rates(optimizers, step, len(plan), max(1, round(0.03 * len(plan))))
            for optimizer in optimizers:
                optimizer.zero_grad()
            run_step(model, [rows[number] for number in numbers], 8, 0, "cpu", tuning.dtype == "float32")
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if merger is not None:
                merger.step()
            if tuning.ema:
                for name, tensor in take(plain).items():
                    average[name] = average.get(name, tensor).lerp(tensor, 1.0 - tuning.ema)
    if tuning.method == "lora":
        model.merge_and_unload()
        for parameter in plain.parameters():
            parameter.requires_grad_(True)
    if poet:
        unwrap(plain)
    plain.eval().zero_grad(set_to_none=True)
    tuned = average or take(plain)
    plain.float()
    return tuned


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """NEFTune (arXiv 2310.05914): uniform noise of alpha / sqrt(length * width) on the embeddings, in training."""
    if not alpha:
        yield
        return

    def add_noise(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        bound = alpha / (embedded.shape[1] * embedded.shape[2]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def load_other_text(base: Base) -> list[Row]:
    """Windows of the held-out end of a text, every token learnt: text outside the task, for what is forgotten."""
    text = read_text(base.text)[1]
    ids = [base.encode(text[at : at + 400])[:96] for at in range(0, len(text) - 400, len(text) // 16)]
    return [(each, [-100, *each[1:]]) for each in ids]
