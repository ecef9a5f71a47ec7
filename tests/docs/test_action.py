"""The GitHub Action: its shell steps run one after the other as a runner would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from support.checkpoints import ROOT, llama_pair
from support.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.slow
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def run_action(tmp_path: Path, variables: dict[str, str], steps: tuple[str, ...], **given: str):
    """Status and outputs of the named steps; a failed step ends the run."""
    inputs = {name: str(entry.get("default", "")) for name, entry in ACTION["inputs"].items()} | given
    assert inputs.keys() == ACTION["inputs"].keys(), "an input that the action does not have"
    outputs = tmp_path / "github-output"
    outputs.touch()

    def fill(text: str) -> str:
        text = text.replace("${{ github.action_path }}", str(ROOT))
        return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: inputs[found[1]], text)

    def holds(condition: str) -> bool:
        known = dict(line.split("=") for line in outputs.read_text().splitlines())
        parts = [part.strip() for part in condition.split("&&")]
        answers = {
            "steps.run.outputs.written == 'true'": known.get("written") == "true",
            "inputs.push-to-hub != ''": inputs["push-to-hub"] != "",
        }
        return all(answers[part] for part in parts)

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    base = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "GITHUB_OUTPUT": str(outputs), **variables}
    said = []
    for step in ACTION["runs"]["steps"]:
        if step["name"] not in steps or ("if" in step and not holds(step["if"])):
            continue
        environment = base | {name: fill(value) for name, value in step.get("env", {}).items()}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        said.append(step["name"])
        if done.returncode:
            return done.returncode, said, done.stderr + done.stdout
    return 0, said, outputs.read_text()


STEPS = ("Run", "Verify", "Upload")


def test_edits_and_verifies(tmp_path):
    base, ft = llama_pair(tmp_path)
    status, said, outputs = run_action(
        tmp_path, {}, STEPS, base=str(base), **{"fine-tuned": str(ft)}, options="--layers 're:.*down_proj' --beta 0.5"
    )
    assert (status, said, outputs) == (0, ["Run", "Verify"], "written=true\n"), outputs
    manifest = yaml.safe_load((tmp_path / "pome-out" / "pome_manifest.json").read_text())
    assert manifest["spec"]["layers"] == ["re:.*down_proj"]
    assert manifest["spec"]["beta"] == 0.5


def test_the_action_uploads_the_verified_output(tmp_path):
    base, ft = llama_pair(tmp_path)
    with HubServer() as server:
        variables = {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        given = {"base": str(base), "fine-tuned": str(ft), "push-to-hub": "somebody/model-pome"}
        status, said, outputs = run_action(tmp_path, variables, STEPS, **given)
    assert (status, said) == (0, ["Run", "Verify", "Upload"]), outputs


def test_a_sweep_that_finds_nothing_better_uploads_nothing(tmp_path):
    base, ft = llama_pair(tmp_path)
    status, said, outputs = run_action(
        tmp_path, {}, STEPS, base=str(base), **{"fine-tuned": str(ft), "push-to-hub": "somebody/x"},
        command="sweep", options="--beta 1,2 --score-cmd 'echo {model} >/dev/null; echo 1'",
    )  # fmt: skip
    assert (status, said, outputs) == (0, ["Run"], "written=false\n"), outputs


@pytest.mark.parametrize(
    ("given", "message"),
    [({"command": "delete"}, "give edit or sweep"), ({"options": "--betta 2"}, "betta")],
)
def test_a_wrong_input_stops_the_job(tmp_path, given, message):
    base, ft = llama_pair(tmp_path)
    status, said, outputs = run_action(tmp_path, {}, STEPS, base=str(base), **{"fine-tuned": str(ft)}, **given)
    assert status == 2
    assert said == ["Run"]
    assert message in outputs


def test_the_install_step_installs_this_checkout(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    # torch and the others are left out: it is the step that is tested, and they take minutes.
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", "hatchling"], check=True, cwd=tmp_path)
    variables = {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]])}
    variables |= {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    given = {"base": "b", "fine-tuned": "f", "command": "sweep", "install-options": "--quiet --no-compile"}
    status, _, outputs = run_action(tmp_path, variables, ("Install",), **given)
    assert status == 0, outputs
    assert list((tmp_path / "venv").glob("lib/*/site-packages/pome/cli/app.py"))
