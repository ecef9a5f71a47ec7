#!/usr/bin/env python3
"""Mutation testing: small faults put into the code one at a time, to see whether the tests find them.

    scripts/mutate.py                                   all packages below, every site: hours
    scripts/mutate.py --package roles planning --sample 60
    scripts/mutate.py --package kernel --sample 60 --state ~/mutants --seconds 200    again and again, until it ends
    scripts/mutate.py --module src/pome/kernel/rank.py --tests tests/kernel/test_rank.py --sample 30 --seed 1

The faults are those of cosmic-ray: another operator or comparison, a number off by one, a negated condition, a loop
that never runs, a missing decorator. A site is a place in the source. One of its faults is drawn by the seed, and
`--sample` draws so many sites of each package (of all `--module` files together). Survivors are printed as a change of
the line. What changes no result is left out: annotations, `is` in place of `==`, and the guards `frozen`, `slots` and
`strict`.

First each test file, but for the tests marked slow, runs once under a trace that says which test runs which lines
(`line_trace.py`; fixtures and child processes count). A mutant then meets the tests that run its statement, the
quickest first, until one fails; a fault at a module's top or in a cached function meets all that touch the module. The
tests run in a copy of the tree, in a process forked from one that has the libraries loaded. A test that takes more than
four times its time and ten seconds counts as a kill.

`--state` is a folder that keeps traces and outcomes: a run goes on where the last one stopped (`--seconds`), traces
only test files that changed, and with `--again` repeats the mutants that survived.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import json
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
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

import line_trace

ROOT = Path(__file__).resolve().parents[1]
# Package: the files that are changed, the tests that must notice.
PACKAGES = {
    "kernel": (["src/pome/kernel/**/*.py"], ["tests/kernel", "tests/inspection"]),
    "roles": (["src/pome/roles/*.py"], ["tests/roles"]),
    "planning": (
        ["src/pome/planning/[!_l]*.py"],
        ["tests/planning", "tests/checkpoint/test_quantization.py", "tests/editing/test_extract.py"],
    ),
    "bootstrap": (["src/pome/sweeping/bootstrap.py"], ["tests/sweeping/test_[bi]*.py"]),
    "sidefiles": (["src/pome/checkpoint/sidefiles.py"], ["tests/checkpoint/test_sidefiles.py"]),
    "adapters": (
        ["src/pome/checkpoint/lora*.py", "src/pome/planning/lora_plan.py", "src/pome/editing/lora_*.py"],
        [
            "tests/checkpoint/test_lora*.py",
            "tests/planning/test_lora_plan.py",
            "tests/editing/test_lora_[crn]*.py",
        ],
    ),
}
# Of these the modules that the tests turned out to need are loaded once, before the forks.
PRELOADED = frozenset(
    ["huggingface_hub", "hypothesis", "numpy", "peft", "safetensors", "torch", "transformers", "yaml"]
)
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


@dataclass(frozen=True)
class Site:
    """A place in a module, (line, column) to (line, column), and the faults that can be put there: (operator, nth)."""

    module: str
    span: tuple[tuple[int, int], tuple[int, int]]
    faults: tuple[tuple[str, int], ...]


def find_sites(module: str) -> list[Site]:
    source = (ROOT / module).read_text("utf-8")
    nodes, unmutable = list(ast_nodes(get_ast(source))), find_unmutable(source)
    sites = defaultdict(list)
    provider = OperatorProvider()
    for name in provider:
        if provider[name].arguments() or name.endswith(("_Eq_Is", "_NotEq_IsNot")):
            continue  # the first ask for names of variables
        spans = [span for node in nodes for span in provider[name]().mutation_positions(node)]
        for occurrence, span in enumerate(spans):
            if not any(start <= span[0] and span[1] <= end for start, end in unmutable):
                sites[span].append((name, occurrence))
    return [Site(module, span, tuple(faults)) for span, faults in sorted(sites.items())]


def make_mutant(site: Site, rng: random.Random) -> Mutant | None:
    """One of a site's faults, or None where none changes the code."""
    source = (ROOT / site.module).read_text("utf-8")
    plain = ast.dump(ast.parse(source))
    for name, occurrence in rng.sample(site.faults, len(site.faults)):
        try:
            mutated = mutate_code(source, OperatorProvider()[name](), occurrence)
            changed = mutated is not None and ast.dump(ast.parse(mutated)) != plain
        except (SyntaxError, AttributeError):  # the second is cosmic-ray's on `except module.Name`
            continue
        if changed:
            return Mutant(site.module, site.span[0][0], name, mutated)
    return None


def draw_mutants(modules: list[str], sample: int | None, seed: int, state: Path) -> tuple[list[Mutant], int]:
    """The mutants of a sample, in the order of the source, and how many sites there are."""
    sources = b"".join((ROOT / module).read_bytes() for module in modules)
    kept = state / f"mutants-{sample}-{seed}-{hashlib.sha256(sources).hexdigest()[:16]}.json"
    if kept.exists():
        said = json.loads(kept.read_text())
        return [Mutant(**one) for one in said["mutants"]], said["sites"]
    rng = random.Random(seed)
    sites = [site for module in modules for site in find_sites(module)]
    drawn: dict[int, Mutant] = {}
    for at in rng.sample(range(len(sites)), len(sites)):
        if sample is not None and len(drawn) == sample:
            break
        if mutant := make_mutant(sites[at], rng):
            drawn[at] = mutant
    mutants = [drawn[at] for at in sorted(drawn)]
    kept.write_text(json.dumps({"mutants": [vars(one) for one in mutants], "sites": len(sites)}))
    return mutants, len(sites)


class Recorder:
    """A plugin of pytest: the lines that each test runs, with those of shared fixtures, and its processor seconds."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.under = tree, str(tree / "src")
        self.folder = Path(tempfile.mkdtemp(dir=tree))
        self.sinks: list[Path] = []
        self.shared: dict[int, Path] = {}  # by the identity of a fixture that several tests use
        self.tests: dict[str, tuple[float, list[Path]]] = {}

    def begin(self, sink: Path) -> Path:
        line_trace.begin(str(sink), self.under)
        self.sinks.append(sink)
        return sink

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Iterator[None]:
        own, started = self.begin(self.folder / f"{len(self.tests)}"), sum(os.times()[:4])
        result = yield
        known = item._fixtureinfo.name2fixturedefs
        fixtures = [found for name in item.fixturenames for found in known.get(name, ())]
        sinks = [own, *(self.shared[id(one)] for one in fixtures if id(one) in self.shared)]
        self.tests[item.nodeid] = sum(os.times()[:4]) - started, sinks
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Iterator[None]:
        if fixturedef.scope == "function" or not self.sinks:
            return (yield)
        before = self.sinks[-1]
        self.shared[id(fixturedef)] = self.begin(self.folder / f"shared-{id(fixturedef)}")
        try:
            return (yield)
        finally:
            self.begin(before)

    def write(self, path: Path) -> None:
        tests = {}
        for name, (seconds, sinks) in self.tests.items():
            lines = defaultdict(set)
            for place in {place for sink in sinks for place in sink.read_text().split("\n") if place}:
                module, _, line = place.rpartition(":")
                lines[str(Path(module).relative_to(self.tree))].add(int(line))
            tests[name] = {"seconds": seconds, "lines": {module: sorted(found) for module, found in lines.items()}}
        loaded = [name for name in sys.modules if name.partition(".")[0] in PRELOADED]
        path.write_text(json.dumps({"tests": tests, "loaded": loaded}))


class Chooser:
    """A plugin of pytest: the named tests in the order given, each with a limit of processor and of wall time."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.order = seconds, {name: at for at, name in enumerate(seconds)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        found = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(found, key=lambda item: self.order[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> None:
        used, limit = resource.getrusage(resource.RUSAGE_SELF), 4 * self.seconds[item.nodeid] + 10
        soft = int(used.ru_utime + used.ru_stime + limit)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        signal.alarm(int(5 * limit))  # for what waits and takes no processor time


def run_tests(tree: Path, files: list[str], plugin: Recorder | Chooser, record: Path | None = None) -> int:
    """Status of the tests of a tree, 0 where all pass, run in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = be_tests(tree, files, plugin)
            if record and isinstance(plugin, Recorder):
                sys.settrace(None)
                plugin.write(record)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests left running
    return os.waitstatus_to_exitcode(status)


def be_tests(tree: Path, files: list[str], plugin: Recorder | Chooser) -> int:
    """Become the process of the tests: pytest's status."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.path[:] = [str(tree / "src"), *(path for path in sys.path if path != str(ROOT / "scripts"))]
    os.chdir(tree)
    with open(tree / "output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # pytest would rewrite the assertions of what is loaded by now, and cannot.
    quiet = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main(["-x", "-m", "not slow", *quiet, *files], plugins=[plugin])
    sys.stdout.flush()
    return int(status)


@dataclass
class Bench:
    """A copy of the tree, and which of the tests run which lines."""

    tree: Path
    state: Path
    tests: dict[str, dict]

    def record(self, modules: list[str], files: list[str], until: float) -> bool:
        """Trace the test files that have no trace yet: whether time sufficed."""
        site = self.tree / "src/sitecustomize.py"
        sources = [(ROOT / path).read_bytes() for path in modules]
        for file in files:
            digest = hashlib.sha256(b"".join([*sources, (ROOT / file).read_bytes()])).hexdigest()[:16]
            path = self.state / f"{Path(file).parent.name}-{Path(file).stem}-{digest}.json"
            if not path.exists():
                if time.monotonic() > until:
                    return False
                shutil.copy(ROOT / "scripts/line_trace.py", site)
                status = run_tests(self.tree, [file], Recorder(self.tree), path)
                site.unlink()
                if status not in (0, 5):  # 5: all are slow
                    path.unlink(missing_ok=True)
                    sys.exit(f"{file} fails without any fault:\n{(self.tree / 'output.txt').read_text()}")
            found = json.loads(path.read_text())
            self.tests |= found["tests"]
            for name in found["loaded"]:
                with contextlib.suppress(Exception):  # a module that the tests made, or that loads only in its turn
                    importlib.import_module(name)
        return True

    def find_tests(self, mutant: Mutant) -> dict[str, float]:
        """The tests that a mutant has to meet and their seconds, the quickest first."""
        runs = {name: set(test["lines"].get(mutant.module, ())) for name, test in self.tests.items()}
        lines = find_statement((ROOT / mutant.module).read_text("utf-8"), mutant.line)
        found = [name for name, ran in runs.items() if (ran if lines is None else ran & lines)]
        return dict(sorted(((name, self.tests[name]["seconds"]) for name in found), key=lambda pair: pair[1]))

    def try_mutant(self, mutant: Mutant) -> tuple[str, str]:
        """Killed or survived, and by what."""
        tests = self.find_tests(mutant)
        if not tests:
            return "survived", "no test runs it"
        path = self.tree / mutant.module
        original = path.read_bytes()
        path.write_text(mutant.source, "utf-8")
        status = run_tests(self.tree, sorted({name.partition("::")[0] for name in tests}), Chooser(tests))
        path.write_bytes(original)
        if status in (0, 5):
            return "survived", f"{len(tests)} tests, {sum(tests.values()):.0f} s"
        failed = [
            line for line in (self.tree / "output.txt").read_text(errors="replace").splitlines() if "FAILED" in line
        ]
        return "killed", failed[-1][:160] if failed else f"status {status}"


@functools.cache
def find_statement(source: str, line: int) -> frozenset[int] | None:
    """The lines of the innermost statement around a line, a compound one's head alone; None where imports run it.

    None also in a function whose results are cached, whose lines run for the first caller only.
    """
    body, lines, cached, inside = ast.parse(source).body, frozenset([line]), False, False
    while found := [node for node in body if node.lineno <= line <= (node.end_lineno or 0)]:
        node = found[0]
        inner = [
            child for name in ("body", "handlers", "orelse", "finalbody", "cases") for child in getattr(node, name, [])
        ]
        inner = [one for child in inner for one in ([child] if isinstance(child, ast.stmt) else child.body)]
        head = min([child.lineno for child in inner], default=(node.end_lineno or 0) + 1)
        lines = frozenset(range(node.lineno, max(head, node.lineno + 1)))
        if isinstance(node, ast.FunctionDef) and line >= head:
            inside = True
            cached |= any(ast.unparse(one).endswith(".cache") for one in node.decorator_list)
        body = inner
    return lines if inside and not cached else None


def test_package(
    name: str, modules: list[str], files: list[str], given: argparse.Namespace, state: Path
) -> Counter[tuple[str, str]] | None:
    """How many mutants of each module were killed and how many survived, or None where time ran out before the end."""
    until = time.monotonic() + (given.seconds or float("inf"))
    outcomes = state / f"outcomes-{name}-{given.sample}-{given.seed}.jsonl"
    known = {}
    for line in outcomes.read_text().splitlines() if outcomes.exists() else ():
        known[json.loads(line)["mutant"]] = json.loads(line)
    mutants, sites = draw_mutants(modules, given.sample, given.seed, state)
    results: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="pome-mutate-") as folder:
        bench = Bench(Path(folder) / "tree", state, {})
        shutil.copytree(ROOT, bench.tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        if not bench.record(modules, files, until):
            return None
        print(f"{name}: {len(mutants)} of {sites} sites, {len(bench.tests)} tests", flush=True)
        for mutant in mutants:
            digest = hashlib.sha256((mutant.module + mutant.source).encode()).hexdigest()[:16]
            if digest not in known or (given.again and known[digest]["outcome"] == "survived"):
                if time.monotonic() > until:
                    return None
                started = sum(os.times()[:4])
                outcome, why = bench.try_mutant(mutant)
                text = mutant.format((ROOT / mutant.module).read_text("utf-8"))
                known[digest] = {"mutant": digest, "outcome": outcome, "why": why, "text": text}
                known[digest]["seconds"] = round(sum(os.times()[:4]) - started, 1)
                with open(outcomes, "a") as file:
                    print(json.dumps(known[digest]), file=file)
                if outcome == "survived":
                    print(text, f"    ({why})", sep="\n", flush=True)
            results[mutant.module, known[digest]["outcome"]] += 1
    return results


def expand(patterns: list[str]) -> list[str]:
    """The files of the patterns, relative to the root, of a folder its tests; each pattern must find one."""
    found = [sorted(path for path in ROOT.glob(pattern)) for pattern in patterns]
    if missing := [pattern for pattern, paths in zip(patterns, found, strict=True) if not paths]:
        sys.exit(f"no such file: {' '.join(missing)}")
    files = [file for paths in found for path in paths for file in (sorted(path.glob("test_*.py")) or [path])]
    return [str(file.relative_to(ROOT)) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", nargs="+", choices=PACKAGES, default=[])
    for name in ("--module", "--tests"):
        parser.add_argument(name, nargs="+", metavar="PATH", default=[])
    parser.add_argument("--sample", type=int, metavar="N", help="so many sites, not all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--state", type=Path, metavar="FOLDER", help="keeps traces and outcomes, for the next run to go on"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after so many, to go on with --state")
    parser.add_argument("--again", action="store_true", help="repeat the mutants that survived")
    given = parser.parse_args()
    if bool(given.module) != bool(given.tests):
        parser.error("--module and --tests go together")
    chosen = {name: PACKAGES[name] for name in given.package or ([] if given.module else PACKAGES)}
    if given.module:
        chosen["modules"] = (given.module, given.tests)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as passing:
        state = given.state or Path(passing)
        state.mkdir(parents=True, exist_ok=True)
        for name, (modules, tests) in chosen.items():
            results = test_package(name, expand(modules), expand(tests), given, state.resolve())
            if results is None:
                sys.exit(f"{name}: not at its end after {time.perf_counter() - started:.0f} s; the same call goes on")
            for module in [*dict.fromkeys(module for module, _ in results), name]:
                counts = [(what, n) for (of, what), n in results.items() if module in (of, name)]
                killed, survived = (sum(n for what, n in counts if what == end) for end in ("killed", "survived"))
                print(f"{module}: {killed} killed, {survived} survived, {killed / max(1, killed + survived):.0%}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
