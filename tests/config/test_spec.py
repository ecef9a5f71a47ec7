"""What is asked: values out of range, options at odds, YAML with its lines, merging of a file and options."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pome import EditSpec, SpecError
from pome.choices import DTYPES, RANK_RULES, SCALES
from pome.cli.batch import read_batch
from pome.config.conflicts import merge_options
from pome.config.options import nearest
from pome.config.outputs import Replacing
from pome.config.yaml_text import make_spec, read_config


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text)
    return path


def test_the_defaults_are_those_of_the_paper() -> None:
    spec = EditSpec()
    assert (spec.layers, spec.rank_ratio, spec.rank_rule, spec.scale, spec.beta) == (
        ("up",), 0.5, "ratio", "frobenius", 1.0
    )  # fmt: skip
    assert (spec.exclude, spec.rank, spec.energy, spec.dtype, spec.device) == ((), None, 0.9, "keep", "auto")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, "beta", 2.0)  # noqa: B010 - what mypy forbids is tried


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": ("upp",)}, "layers: 'upp' is neither a role .* did you mean 'up'"),
        ({"layers": ()}, "layers: nothing is selected"),
        ({"layers": ("re:(",)}, r"layers: '\(' is not a regular expression"),
        ({"layers": 3}, "layers: 3 is not a text"),
        ({"layers": [1]}, "is not a text or a list of texts"),
        ({"exclude": ("[",)}, r"exclude: '\[' is not a regular expression"),
        ({"rank_ratio": 0}, "rank_ratio: 0 is not a number above 0 and at most 1"),
        ({"rank_ratio": 1.01}, "rank_ratio: 1.01"),
        ({"rank_ratio": math.nan}, "rank_ratio: nan"),
        ({"rank_ratio": "half"}, "rank_ratio: 'half'"),
        ({"rank_ratio": True}, "rank_ratio: True"),
        ({"energy": 1.5}, "energy: 1.5"),
        ({"beta": 0.0}, "beta: 0.0 is not a number from 1e-06"),
        ({"beta": -1}, "beta: -1"),
        ({"beta": math.inf}, "beta: inf"),
        ({"rank": 0}, "rank: 0 is not a whole number of at least 1"),
        ({"rank": 2.5}, "rank: 2.5"),
        ({"rank": True}, "rank: True"),
        ({"rank_rule": "ratios"}, "rank_rule: 'ratios' .*did you mean 'ratio'"),
        ({"rank_rule": "fixed"}, "'fixed' needs rank"),
        ({"rank": 3, "rank_rule": "energy"}, "exclude each other"),
        ({"scale": "loud"}, "scale: 'loud' is not one of frobenius, unit"),
        ({"dtype": "bf16"}, "dtype: 'bf16' is not one of .*did you mean 'bfloat16'"),
        ({"device": "cuda:x"}, "device: 'cuda:x' is none of auto, cpu"),
        ({"device": 0}, "device: 0"),
        ({"engine": "cloud"}, "engine: 'cloud'"),
        ({"layers": ("re:",)}, "layers: 're:' has no pattern"),
        ({"exclude": ("",)}, "exclude: empty"),
        ({"beta": 9e-7}, "beta: 9e-07 is not a number from 1e-06 to 1e\\+06"),
        ({"beta": 10**400}, "beta: 1000"),
        ({"beta": 16**9000}, "beta: a number of thousands of digits"),
        ({"energy": 10**400}, "energy: 1000"),
        ({"rank": 16**9000}, "rank: a number of thousands of digits is not a whole number of at least 1"),
        ({"scale": ["mean"]}, r"scale: \['mean'\] is not one of"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        EditSpec(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_names_are_split_at_commas_and_patterns_are_not() -> None:
    assert EditSpec(layers=("up, gate,up", r"re:x{1,2}")).layers == ("up", "gate", r"re:x{1,2}")  # type: ignore[arg-type]
    assert EditSpec(layers="ffn").layers == ("ffn",)  # type: ignore[arg-type]


def test_a_rank_alone_means_fixed_and_an_energy_alone_means_energy() -> None:
    assert EditSpec(rank=7).rank_rule == "fixed"
    assert EditSpec.from_mapping({"energy": 0.8}).rank_rule == "energy"
    assert EditSpec.from_mapping({"energy": 0.8, "rank_rule": "ratio"}).rank_rule == "ratio"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 4, "rank_ratio": 0.3}, "rank_ratio: has no effect with rank"),
        ({"energy": 0.5, "rank_ratio": 0.5}, "energy: has no effect with rank_ratio"),
        ({"rank_rule": "ratio", "energy": 0.8}, "energy: has no effect with rank_rule 'ratio'"),
        ({"rank_rule": "noise-floor", "rank_ratio": 0.3}, "rank_ratio: has no effect with rank_rule 'noise-floor'"),
        ({"rank_rule": "ratio", "rank": 4}, "rank: has no effect with rank_rule 'ratio'"),
        ({"overrides": [{"match": "a", "rank": 3, "energy": 0.5}]}, "overrides: 'a': energy: has no effect with rank"),
        ({"bta": 1.0}, "unknown option 'bta'; did you mean 'beta'"),
    ],
)
def test_an_option_that_could_take_no_effect_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        EditSpec.from_given(options)


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"rank": 4, "rank_rule": "fixed"}, {"energy": 0.5, "rank_rule": "energy"}, {"rank": None}]
)
def test_options_that_choose_k_together_are_heard(options: dict[str, object]) -> None:
    assert EditSpec.from_given(options) == EditSpec.from_mapping(options)
    # What a manifest says of it, defaults and all, is a config file that asks for the same.
    assert EditSpec.from_given(EditSpec.from_given(options).to_mapping()) == EditSpec.from_given(options)


specs = st.builds(
    dict,
    layers=st.lists(st.sampled_from(["up", "gate", "ffn", "re:a{1,2}"]), min_size=1, unique=True).map(tuple),
    exclude=st.lists(st.sampled_from(["x", r"\.0\."])).map(tuple),
    rank_ratio=st.floats(0, 1, exclude_min=True),
    rank_rule=st.sampled_from([rule for rule in RANK_RULES if rule != "fixed"]),
    energy=st.floats(0, 1, exclude_min=True),
    scale=st.sampled_from(list(SCALES)),
    beta=st.floats(1e-6, 1e6),
    dtype=st.sampled_from(list(DTYPES)),
)


@given(specs)
def test_a_spec_survives_yaml(options: dict[str, object]) -> None:
    spec = EditSpec(**options)  # type: ignore[arg-type]
    assert EditSpec.from_mapping(yaml.safe_load(yaml.safe_dump(spec.to_mapping()))) == spec


def test_options_win_over_a_file_and_choosing_k_sets_all_of_its_choice_aside() -> None:
    file = {"rank_rule": "energy", "energy": 0.8, "beta": 2.0}
    assert merge_options(file, {"beta": 1.0}) == {"rank_rule": "energy", "energy": 0.8, "beta": 1.0}
    assert merge_options(file, {"rank": 4}) == {"rank": 4, "beta": 2.0}
    assert EditSpec.from_mapping(merge_options({"rank": 4}, {"rank_ratio": 0.25})).rank_rule == "ratio"


def test_a_config_is_read_with_the_names_of_the_options(tmp_path: Path) -> None:
    text = "# a comment\nlayers: [up, 're:a,b']\nrank_ratio: 0.25\nscale: rms\n"
    assert read_config(write(tmp_path, text)) == {"layers": ["up", "re:a,b"], "rank_ratio": 0.25, "scale": "rms"}


# A few hundred bytes that stand for 10^12 words.
ALIASES = "layers:\n  - &x0 [a]\n" + "".join(f"  - &x{i} [{','.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 13))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: up\nrank_ration: 0.5\n", "file.yaml:2: unknown key 'rank_ration'; did you mean 'rank_ratio'?"),
        ("qqqq: 1\n", "file.yaml:1: unknown key 'qqqq'; known keys: layers, exclude"),
        ("beta: 1\n\nbeta: 2\n", "file.yaml:3: key 'beta' stands here and in line 1; keep one"),
        ("scale: unit\nbeta: no\n", "file.yaml:2: beta: False is not a number from 1e-06"),
        ("beta: 1\nrank_ratio: '0.5'\n", "file.yaml:2: rank_ratio: '0.5' is not a number above 0 and at most 1"),
        ("scale: Frobenius\n", "file.yaml:1: scale: 'Frobenius' is not one of"),
        ("layers: [1]\n", "file.yaml:1: layers: [1] is not a text"),
        ("rank_rule: null\n", "file.yaml:1: rank_rule: None is not one of"),
        ("rank: '4'\n", "file.yaml:1: rank: '4' is not a whole number"),
        (
            "beta: 1e-1\n",
            "file.yaml:1: beta: '1e-1' is not a number from 1e-06 to 1e+06; YAML reads this as text; write",
        ),
        (f"rank: 0x{'f' * 6000}\n", "file.yaml:1: rank: a number of thousands of digits"),
        ("beta: 1.0\nbase: x\n", "file.yaml:2: unknown key 'base'"),
        ("- up\n", "file.yaml:1: expected 'key: value' lines here"),
        ("? [a]\n: 1\n", "file.yaml:1: a key that is not a word"),
        ("beta: [1\n", "file.yaml:2: not YAML"),
        ("beta: !!python/object/apply:os.system [true]\n", "file.yaml:1: beta: could not determine a constructor"),
        ("", "file.yaml: empty"),
        ("[" * 5000, "file.yaml: not YAML: nested too deeply"),
        ("beta: \0\n", "file.yaml: not YAML"),
        ("layers: &a\n  - *a\n", "file.yaml:1: not YAML: nested too deeply"),
        (ALIASES, "file.yaml:2: not YAML: over 1000000 values with the aliases written out"),
    ],
)
def test_a_wrong_config_is_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_config(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["jobs: &a\n  - *a\n", "jobs: [a]\ndefaults: &a\n  base: *a\n", ALIASES.replace("layers", "jobs")],
    ids=["jobs", "defaults", "aliases"],
)
def test_a_batch_without_end_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"file.yaml:\d: not YAML: (nested|over)"):
        read_batch(write(tmp_path, text))


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere.yaml: cannot be read: No such file"):
        read_config(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (5 << 20))
    with pytest.raises(SpecError, match="over 4 MiB"):
        read_config(tmp_path / "large.yaml")


def test_options_at_odds_in_a_config_name_it_unless_the_command_line_settles_them(tmp_path: Path) -> None:
    path = write(tmp_path, "rank: 4\nenergy: 0.5\n")
    with pytest.raises(SpecError, match="file.yaml: energy: has no effect with rank"):
        make_spec(path, {"beta": 2.0}, EditSpec)
    assert make_spec(path, {"rank_ratio": 0.25}, EditSpec) == EditSpec(rank_ratio=0.25)
    with pytest.raises(SpecError, match="^beta: -1"):
        make_spec(path, {"beta": -1}, EditSpec)


def test_the_home_folder_is_found_in_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "beta: 2.0\n")
    assert read_config(Path("~/file.yaml")) == {"beta": 2.0}


JOBS = """\
defaults: {base: b, rank_rule: energy, energy: 0.8, layers: [up]}
jobs:
  - {name: one, fine_tuned: f, out: o1}
  - name: two
    fine_tuned: f
    out: o2
    rank: 8
    beta: 1.5
    overwrite: true
  - {fine_tuned: f, out: o3, base: c}
"""


def test_a_batch_gives_each_job_the_defaults_and_lets_it_win(tmp_path: Path) -> None:
    one, two, three = read_batch(write(tmp_path, JOBS))
    assert (one.name, one.base, one.fine_tuned, one.out, one.command) == ("one", "b", "f", "o1", "edit")
    assert one.spec == EditSpec(rank_rule="energy", energy=0.8)
    assert two.spec == EditSpec(rank=8, beta=1.5)
    assert (two.replacing, one.replacing) == (Replacing(overwrite=True), Replacing())
    assert (three.name, three.base) == ("o3", "c")


def test_a_default_that_a_command_does_not_take_is_left_to_the_others(tmp_path: Path) -> None:
    text = """\
defaults: {base: b, fine_tuned: f, score_cmd: 'x {model}', full: true, html: h, rank_ratio: 0.25, device: cpu}
jobs:
  - {out: o}
  - {command: inspect}
  - {command: inspect, out: o}
  - {command: verify, out: o}
  - {command: sweep, out: p, rank_ratio: [0.25, 0.5]}
"""
    edit, pair, output, verify, sweep = read_batch(write(tmp_path, text))
    assert edit.spec == EditSpec(rank_ratio=0.25, device="cpu")
    assert (pair.reports.html, pair.spec.rank_ratio, output.base, output.out) == ("h", 0.25, None, "o")
    assert verify.full and sweep.grid.size == 2


def test_an_edit_in_the_defaults_is_that_of_a_look_at_weights_alone(tmp_path: Path) -> None:
    text = """\
defaults: {base: b, fine_tuned: f, beta: 1.5, rank: 3}
jobs:
  - {command: inspect, weights: true, scale: mean}
  - {name: plain, command: inspect, energy: 0.5}
"""
    weights, plain = read_batch(write(tmp_path, text))
    assert (weights.weights, weights.spec.beta, weights.spec.rank, weights.spec.scale) == (True, 1.5, 3, "mean")
    assert (plain.weights, plain.spec.beta, plain.spec.rank, plain.spec.energy) == (False, 1.0, None, 0.5)


def test_only_keeps_the_named_jobs(tmp_path: Path) -> None:
    path = write(tmp_path, JOBS)
    assert [job.name for job in read_batch(path, ["two", "one"])] == ["one", "two"]
    with pytest.raises(SpecError, match="no job is named 'tow'; did you mean 'two'"):
        read_batch(path, ["tow"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job: []\n", "file.yaml:1: unknown key 'job'; did you mean 'jobs'?"),
        ("jobs: []\n", "'jobs' must be a list of at least one job"),
        ("defaults: {}\n", "'jobs' must be a list"),
        ("jobs: {a: b}\n", "'jobs' must be a list"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: o}\n  - {base: b, fine_tuned: f, oot: p}\n",
         "file.yaml:3: unknown key 'oot'; did you mean 'out'?"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: o}\n  - {fine_tuned: f, out: p}\n", "file.yaml:3: base: missing"),
        ("jobs:\n  - {base: b, fine_tuned: 3, out: o}\n", "file.yaml:2: fine_tuned: not a text"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: o, command: edits}\n", "command: 'edits' is not one of edit"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: o, fresh: 1}\n", "fresh: 1 is not true or false"),
        ("jobs:\n  - base: b\n    fine_tuned: f\n    out: o\n    beta: -1\n", "file.yaml:5: beta: -1"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: o, rank: 3, rank_rule: energy}\n",
         "file.yaml:2: rank: rank and rank_rule 'energy' exclude"),
        ("jobs:\n  - {name: a, base: b, fine_tuned: f, out: o}\n  - {name: a, base: b, fine_tuned: f, out: p}\n",
         "two jobs have the name 'a'"),
        ("jobs:\n  - {name: a, base: b, fine_tuned: f, out: o}\n  - {name: c, base: b, fine_tuned: f, out: o}\n",
         "two jobs have the out 'o'"),
        ("jobs:\n  - {name: a, base: b, fine_tuned: f, out: o}\n  - {name: c, base: b, fine_tuned: f, out: ./o}\n",
         "two jobs have the out './o' and 'o'"),
        ("jobs:\n  - {name: a, base: b, fine_tuned: f, out: o/p}\n  - {name: c, base: b, fine_tuned: f, out: o}\n",
         "two jobs have the out 'o' and 'o/p'"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: o, full: true}\n", "full: the command edit does not take that"),
        ("jobs:\n  - {base: b, fine_tuned: f, command: inspect, loss: l}\n", "loss: the command inspect does not"),
        ("jobs:\n  - {base: b, fine_tuned: f, command: inspect, beta: 1.0}\n", "beta: has no effect without weights"),
        ("jobs:\n  - {command: inspect, out: o, weights: true}\n", "weights: has no effect with out"),
        ("jobs:\n  - {base: b, fine_tuned: f, command: inspect, weights: 1}\n", "weights: 1 is not true or false"),
        ("jobs:\n  - {command: inspect, out: o, layers: up}\n", "layers: has no effect with out"),
        ("jobs:\n  - {command: verify, out: o, full: true}\n", "full: every edit is recomputed from both sides"),
        ("jobs:\n  - {command: verify, out: o, base: b}\n", "base: an edit is recomputed from both sides"),
        ("jobs:\n  - {base: '', fine_tuned: f, out: o}\n", "base: empty; is a variable unset?"),
        ("jobs:\n  - {base: b, fine_tuned: f, out: \"o\\0\"}\n", "out: 'o\\x00' holds a null character"),
        ("variables: {z: a, z: b}\njobs:\n  - {base: b, fine_tuned: f, out: o}\n", "file.yaml:1: the variable 'z'"),
        ("defaults: {name: x}\njobs: [{base: b, fine_tuned: f, out: o}]\n", "file.yaml:1: unknown key 'name'"),
        ("jobs:\n  - edit\n", "file.yaml:2: expected 'key: value' lines"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_refused_before_any_job(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_batch(write(tmp_path, text))
    assert said in str(caught.value)


def test_nearest_offers_no_distant_word() -> None:
    assert nearest("rank_ration", ["rank_ratio", "rank"]) == "; did you mean 'rank_ratio'?"
    assert nearest("zzz", ["rank"]) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ray_address": "auto"}, "ray_address: has no effect without engine 'ray'"),
        ({"ray_address": "head", "engine": "ray"}, "ray_address: 'head' is neither auto nor HOST:PORT"),
        ({"ray_address": "ray://head:10001", "engine": "ray"}, "is neither auto nor HOST:PORT"),
        ({"device": "cuda:1", "engine": "ray"}, "device: 'cuda:1' is one of this machine"),
        ({"device": "mps", "engine": "ray"}, "device: 'mps' is one of this machine"),
    ],
)
def test_options_that_contradict_the_engine_ray_are_refused(options, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        EditSpec(**options)


def test_the_address_of_a_cluster_is_no_part_of_what_is_made():
    """The same command goes on at another address: in the next job of a scheduler the head is elsewhere."""
    one, other = (EditSpec(engine="ray", ray_address=f"head{n}:6379").to_mapping() for n in (1, 2))
    assert one == other and one["engine"] == "ray"
