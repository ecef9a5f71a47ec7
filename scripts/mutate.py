#!/usr/bin/env python3
"""Mutation testing: small faults put into the code one at a time, to see whether the tests find them.

    scripts/mutate.py                                   all packages below, every site: hours
    scripts/mutate.py --package roles planning --sample 60
    scripts/mutate.py --module src/pome/kernel/rank.py --tests tests/kernel/test_rank.py --sample 30 --seed 1

The faults are those of cosmic-ray: another operator or comparison, a number off by one, a negated condition, a loop
that never runs, a missing decorator. A site is a place in the source. One of its faults is drawn by the seed, and
`--sample` draws so many sites of each package (of all `--module` files together). Survivors are printed as a change of
the line. The tests, but those marked slow, run in a copy of the tree, in a process forked from one that has the
libraries loaded, with a limit on processor time. What changes no result is left out: annotations, `is` in place of
`==`, and the guards `frozen`, `slots` and `strict`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import parso.python.tree  # noqa: F401 - cosmic_ray's operators load only after it
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parents[1]
# Package: the files that are changed, the tests that must notice.
PACKAGES = {
    "kernel": (["src/pome/kernel/**/*.py"], ["tests/kernel"]),
    "roles": (["src/pome/roles/*.py"], ["tests/roles"]),
    "planning": (["src/pome/planning/[!_l]*.py"], ["tests/planning", "tests/checkpoint/test_quantization.py"]),
    "bootstrap": (["src/pome/sweeping/bootstrap.py"], ["tests/sweeping/test_[bi]*.py"]),
    "sidefiles": (["src/pome/checkpoint/sidefiles.py"], ["tests/checkpoint/test_sidefiles.py"]),
    "adapters": (
        ["src/pome/checkpoint/lora*.py", "src/pome/planning/lora_plan.py", "src/pome/editing/lora_*.py"],
        ["tests/checkpoint/test_lora*.py", "tests/editing/test_lora_rewrite.py"],
    ),
}
# Of these the modules that the tests turned out to need are loaded once, before the forks.
PRELOADED = frozenset(["numpy", "peft", "safetensors", "torch", "transformers"])
MEMORY = 12 << 30  # bytes of address space of one test run: a size that a fault made huge must not fill the machine


@dataclass(frozen=True)
class Mutant:
    """One fault: the file, relative to the root, the line, the operator of cosmic-ray and the whole new source."""

    module: str
    line: int
    operator: str
    source: str

    def format(self, original: str) -> str:
        old, new = original.splitlines(), self.source.splitlines()
        at = next((i for i, pair in enumerate(zip(old, new)) if pair[0] != pair[1]), 0)  # noqa: B905 - a line may go
        return f"{self.module}:{self.line}: {self.operator}\n    - {old[at].strip()}\n    + {new[at].strip()}"


def find_unmutable(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans (start, end), each (line, column), whose change changes no result."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        found += [value for name in ("annotation", "returns") if (value := getattr(node, name, None)) is not None]
        if isinstance(node, ast.keyword) and node.arg in ("frozen", "slots", "strict"):
            found.append(node)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found.append(node)
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in found]


def find_mutants(module: str, rng: random.Random) -> Iterator[Mutant]:
    """One mutant of every site of a module, drawn among the faults that can be put there."""
    source = (ROOT / module).read_text("utf-8")
    tree, plain, unmutable = get_ast(source), ast.dump(ast.parse(source)), find_unmutable(source)
    sites = defaultdict(list)
    provider = OperatorProvider()
    for name in provider:
        if provider[name].arguments() or name.endswith(("_Eq_Is", "_NotEq_IsNot")):
            continue  # the first ask for names of variables
        spans = [span for node in ast_nodes(tree) for span in provider[name]().mutation_positions(node)]
        for occurrence, span in enumerate(spans):
            if not any(start <= span[0] and span[1] <= end for start, end in unmutable):
                sites[span].append((name, occurrence))
    for span, faults in sorted(sites.items()):
        for name, occurrence in rng.sample(faults, len(faults)):
            try:
                mutated = mutate_code(source, provider[name](), occurrence)
                changed = mutated is not None and ast.dump(ast.parse(mutated)) != plain
            except (SyntaxError, AttributeError):  # the second is cosmic-ray's on `except module.Name`
                continue
            if changed:
                yield Mutant(module, span[0][0], name, mutated)
                break


def run_tests(tree: Path, tests: list[str], limit: float | None, loaded: Path | None = None) -> tuple[int, float]:
    """Status, 0 where all pass, and seconds of processor time of the tests of a tree, run in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = be_tests(tree, tests, limit)
            if loaded:
                loaded.write_text("\n".join(name for name in sys.modules if name.partition(".")[0] in PRELOADED))
        finally:
            os._exit(status)
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests left running
    return status, usage.ru_utime + usage.ru_stime


def be_tests(tree: Path, tests: list[str], limit: float | None) -> int:
    """Become the process of the tests: pytest's status. `limit` is in seconds of processor time."""
    os.setsid()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(int(20 * limit))  # for what waits and takes no processor time
        sys.dont_write_bytecode = True  # the tests' own is there from the first run
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.path[:] = [str(tree / "src"), *(path for path in sys.path if path != str(ROOT / "scripts"))]
    os.chdir(tree)
    with open(tree / "output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import pytest

    # pytest would rewrite the assertions of what is loaded by now, and cannot.
    quiet = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main(["-x", "-m", "not slow", *quiet, *tests])
    sys.stdout.flush()
    return int(status)


def test_package(modules: list[str], tests: list[str], sample: int | None, seed: int) -> Counter[tuple[str, str]]:
    """How many mutants of each module were killed and how many survived; survivors are printed as they are found."""
    rng = random.Random(seed)
    mutants = [mutant for module in modules for mutant in find_mutants(module, rng)]
    drawn = sorted(rng.sample(range(len(mutants)), min(sample or len(mutants), len(mutants))))
    results: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="pome-mutate-") as folder:
        tree, loaded = Path(folder) / "tree", Path(folder) / "loaded"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        run_tests(tree, tests, None, loaded)
        for name in loaded.read_text().split() if loaded.exists() else ():
            with contextlib.suppress(Exception):  # a module that the tests made, or that loads only in its turn
                importlib.import_module(name)
        status, seconds = run_tests(tree, tests, None)
        if status != 0:
            sys.exit(f"{' '.join(tests)} fail without any fault:\n{(tree / 'output.txt').read_text()}")
        print(f"{len(drawn)} of {len(mutants)} sites, tests of {seconds:.1f} s: {' '.join(tests)}", flush=True)
        for mutant in (mutants[at] for at in drawn):
            path = tree / mutant.module
            original = path.read_bytes()
            path.write_text(mutant.source, "utf-8")
            for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                stale.unlink()
            status, _ = run_tests(tree, tests, 4 * seconds + 10)
            path.write_bytes(original)
            results[mutant.module, "killed" if status else "survived"] += 1
            if not status:
                print(mutant.format(original.decode()), flush=True)
    return results


def expand(patterns: list[str]) -> list[str]:
    """The paths of the patterns, relative to the root; each pattern must find one."""
    found = [sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)) for pattern in patterns]
    if missing := [pattern for pattern, paths in zip(patterns, found, strict=True) if not paths]:
        sys.exit(f"no such file: {' '.join(missing)}")
    return [path for paths in found for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", nargs="+", choices=PACKAGES, default=[])
    for name in ("--module", "--tests"):
        parser.add_argument(name, nargs="+", metavar="PATH", default=[])
    parser.add_argument("--sample", type=int, metavar="N", help="so many sites, not all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if bool(given.module) != bool(given.tests):
        parser.error("--module and --tests go together")
    chosen = {name: PACKAGES[name] for name in given.package or ([] if given.module else PACKAGES)}
    if given.module:
        chosen["modules"] = (given.module, given.tests)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    for name, (modules, tests) in chosen.items():
        results = test_package(expand(modules), expand(tests), given.sample, given.seed)
        for module in [*dict.fromkeys(module for module, _ in results), name]:
            counts = [(what, n) for (of, what), n in results.items() if module in (of, name)]
            killed, survived = (sum(n for what, n in counts if what == outcome) for outcome in ("killed", "survived"))
            print(f"{module}: {killed} killed, {survived} survived, {killed / max(1, killed + survived):.0%}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
