"""The recipes of experiments/pods, run with stand-ins for gcloud, xpk and srun that only record their arguments."""

import os
import pathlib
import re
import subprocess

import pytest

from anyexperts_jax.cli.main import _parser
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.processes import find_peers

ROOT = pathlib.Path(__file__).parents[2]
PODS = ROOT / "experiments" / "pods"
RECIPES = sorted(path.name for path in PODS.iterdir() if path.suffix in (".sh", ".sbatch"))
ENVIRONMENT = {
    "TPU": "slice", "NAME": "slices", "SLICES": "4", "ZONE": "zone-a", "SHARE": "10.0.0.2:/runs", "CLUSTER": "cluster",
    "PROJECT": "project", "STORAGE": "store", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7",
}  # fmt: skip
STAND_INS = ("gcloud", "xpk", "srun", "scontrol", "sudo", "mountpoint", "pip", "python3", "anyexperts")
NOTE = """#!/bin/sh
for each in "$(basename "$0")" "$@"; do printf '%s\\037' "$each"; done >> "$CALLS"
printf '\\036' >> "$CALLS"
case "$*" in *state.state*) echo ACTIVE;; esac
case "$(basename "$0")" in srun) exit "${SRUN_EXIT:-0}";; esac
"""


@pytest.fixture
def run(tmp_path):
    """Returns a function that runs a command and returns its calls to the stand-ins, each a list of words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in STAND_INS:
        (folder / name).write_text(NOTE)
        (folder / name).chmod(0o755)

    def run(*command, expected=0, **more):
        calls = tmp_path / "calls"
        calls.write_text("")
        own = {"CALLS": str(calls), "PATH": f"{folder}:/usr/bin:/bin", "TMPDIR": str(tmp_path)}
        environment = {**os.environ, **ENVIRONMENT, **more, **own}
        done = subprocess.run(["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        return [call.split("\037")[:-1] for call in calls.read_text().split("\036")[:-1]]

    return run


def trained(calls):
    """Returns options and configuration of the only `anyexperts train` among the calls, read by the real parser."""
    (words,) = [call for call in calls if "train" in call]
    options = _parser().parse_args(words[words.index("train") :])
    return options, load_config(ROOT / options.config, options.set)


def commands(calls):
    """Returns the commands for other machines."""
    return [word.removeprefix("--command=") for call in calls for word in call if word.startswith("--command=")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_bash_and_states_that_it_has_not_run(name):
    subprocess.run(["bash", "-n", PODS / name], check=True)
    text = (PODS / name).read_text()
    assert "set -euo pipefail" in text
    assert "Not run yet" in text or name == "tpu_host.sh"
    assert name in (PODS / "README.md").read_text()


def test_every_configuration_loads():
    for path in PODS.glob("*.toml"):
        load_config(path)


def test_a_slice_runs_the_same_command_on_every_host(run):
    calls = run(str(PODS / "tpu_vm.sh"))
    start, follow = commands(calls)
    assert "--worker=all" in next(call for call in calls if f"--command={start}" in call)
    assert start == "tar xzf anyexperts_jax.tgz && bash anyexperts_jax/experiments/pods/tpu_host.sh 10.0.0.2:/runs"
    assert "journalctl" in follow
    options, config = trained(run(str(PODS / "tpu_host.sh"), "10.0.0.2:/runs"))
    assert (options.processes, str(options.run)) == ("auto", "/runs/ling_mini_2")
    assert config.runtime.compile_cache == "/runs/programs"
    assert config.mesh.sizes(256) == {"data": 1, "fsdp": 32, "expert": 8, "tensor": 1, "sequence": 1}


def test_several_slices_share_the_batch(run):
    calls = run(str(PODS / "tpu_multislice.sh"))
    assert any("--node-count=4" in call or "describe" in call for call in calls)
    start = commands(calls)[0]
    prefix = "tar xzf anyexperts_jax.tgz && bash anyexperts_jax/experiments/pods/tpu_host.sh "
    assert start.startswith(prefix)
    _, config = trained(run(str(PODS / "tpu_host.sh"), *start.removeprefix(prefix).split()))
    assert config.train.batch_size == 1024
    assert config.mesh.sizes(1024)["data"] == 4


def test_a_gke_workload_trains_in_its_image(run):
    calls = run(str(PODS / "gke_xpk.sh"))
    (storage, workload) = calls
    assert storage[:3] == ["xpk", "storage", "attach"]
    (source,) = [word.removeprefix("--script-dir=") for word in workload if word.startswith("--script-dir=")]
    assert (pathlib.Path(source) / "pyproject.toml").exists()
    options, _ = trained(run("-c", commands(calls)[0]))
    assert (options.processes, str(options.run)) == ("auto", "/runs/ling_mini_2")


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (143, True), (5, True)])
def test_a_slurm_job_is_queued_again_if_it_can_resume(run, code, again):
    calls = run(str(PODS / "slurm_gpu.sbatch"), expected=code, SRUN_EXIT=str(code), RUNS="/shared/runs")
    options, config = trained(calls)
    assert options.processes is None
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-8]", "SLURM_PROCID": "0", "SLURM_NTASKS": "64"}
    assert find_peers(None, None, None, step) is not None  # found without options
    assert config.runtime.compile_cache == "/shared/runs/programs"
    assert (["scontrol", "requeue", "7"] in calls) == again
    assert re.findall(
        r"#SBATCH --(?:nodes|ntasks-per-node|gpus-per-node)=(\d+)", (PODS / "slurm_gpu.sbatch").read_text()
    )


def test_a_recipe_names_what_it_needs(run):
    for name, variable in (("tpu_vm.sh", "TPU"), ("tpu_multislice.sh", "SHARE"), ("gke_xpk.sh", "STORAGE")):
        assert run(str(PODS / name), expected=1, **{variable: ""}) == []
