"""Kills runs at random moments and resumes them, until each ends like a run that was never stopped.

    make test-kills        twenty kills of the smallest real model, some minutes
    PYTHONPATH=.:tests python tests/train/kills.py --kills 2 --seed 1

Every process is killed (SIGKILL) after a random part of the time an unbroken one takes, so that kills fall into its
start, its steps, its checkpoints and its validation. If a run ends before it is killed, another one is started.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from anyexperts_jax.models.init import logical_axes
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.checkpoint import Checkpoints
from anyexperts_jax.train.config import to_json
from anyexperts_jax.train.optim import make_optimizer
from anyexperts_jax.train.run_log import read_records
from anyexperts_jax.train.state import abstract_state
from train.stand_in import run_config

TESTS = pathlib.Path(__file__).resolve().parents[1]
TIMES = ("tokens_per_second", "goodput", "time_shares", "step_seconds")  # in a record; no two runs have the same
PATIENCE = 600.0  # seconds for a process that is not killed


class Killer:
    """Starts the same run repeatedly, in processes that share their compiled programs."""

    def __init__(self, folder, *, model="model", steps=300, checkpoint_every=20):
        self.folder, self.model = pathlib.Path(folder), model
        often = {"checkpoint_every": checkpoint_every, "eval_every": 5 * checkpoint_every}
        self.config = run_config(steps=steps, mesh=MeshConfig(data=1), **often)
        (self.folder / "run.json").write_text(to_json(self.config))

    def start(self, run):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        }
        script = pathlib.Path(__file__).with_name("run_process.py")
        command = [sys.executable, str(script), self.model, "train", str(self.folder / "run.json"), "--run", str(run)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self, run):
        """Runs to the end; returns the seconds it took."""
        begin = time.monotonic()
        process = self.start(run)
        said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, said
        return time.monotonic() - begin

    def kill(self, run, after):
        """Kills the run after some seconds; returns the phase, or None if the run had ended."""
        process = self.start(run)
        try:
            said = process.communicate(timeout=after)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return phase(run)
        assert process.returncode == 0, said
        return None


def phase(run):
    """The phase in which a run was killed, judged by what it left."""
    checkpoints = run / "checkpoints"
    if not (run / "metrics.jsonl").exists() or not checkpoints.is_dir():
        return "start"
    writing = [path for path in checkpoints.iterdir() if "orbax-checkpoint-tmp" in path.name]
    return "checkpoint" if writing else "steps"


def records(run):
    """Everything in the log but times."""
    found = read_records(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in found]


def state(killer, run):
    """All arrays of the last checkpoint, and the state of the data iterator."""
    config = killer.config
    optimizer = make_optimizer(config.optim, logical_axes(config.model))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    found, data = checkpoints.restore(checkpoints.latest, abstract_state(config.model, optimizer, mesh), config)
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)], data


def same(killer, run, unbroken):
    """Raises unless two runs are the same, bit for bit."""
    assert json.dumps(records(run)) == json.dumps(records(unbroken)), f"{run}: another log"
    (ours, data), (theirs, other) = state(killer, run), state(killer, unbroken)
    assert data == other, f"{run}: another data state"
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype, f"{run}: another dtype"
        assert one.tobytes() == two.tobytes(), f"{run}: another state"


def kill_and_resume(killer, kills, seed=0, note=lambda line: None):
    """The kills by phase and the number of runs; raises if a run differs from an uninterrupted one."""
    draw, counts, number = random.Random(seed), collections.Counter(), 0
    unbroken = killer.folder / "unbroken"
    killer.finish(unbroken)
    seconds = killer.finish(killer.folder / "again")  # with all programs compiled, as the others find them
    same(killer, killer.folder / "again", unbroken)
    note(f"an unbroken run takes {seconds:.1f} s, the same twice")
    while counts.total() < kills:
        run = killer.folder / f"killed_{number}"
        after = draw.uniform(0, seconds)
        at = killer.kill(run, after)
        if at is None:
            same(killer, run, unbroken)
            number += 1
            continue
        counts[at] += 1
        note(f"kill {counts.total()} of {kills}: {run.name} after {after:.1f} s, at its {at}")
    killer.finish(killer.folder / f"killed_{number}")
    for index in range(number + 1):
        same(killer, killer.folder / f"killed_{index}", unbroken)
    return counts, number + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="model", choices=("model", "linear"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anyexperts_kills_") as folder:
        killer = Killer(folder, model=options.model)
        counts, runs = kill_and_resume(killer, options.kills, options.seed, lambda line: print(line, flush=True))
    told = ", ".join(f"{count} at the {at}" for at, count in sorted(counts.items()))
    print(f"{counts.total()} kills ({told}) over {runs} runs: all end bit for bit as the one that was never stopped")


if __name__ == "__main__":
    main()
