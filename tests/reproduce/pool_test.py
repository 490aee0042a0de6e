"""Several runs at a time: order, failures, the deadline, resuming."""

import dataclasses
import json
import os
import pathlib
import sys
import time

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.config import load_config
from experiments.reproduce import pool
from experiments.reproduce.experiment import Amounts, Run
from experiments.reproduce.pool import core_shares, run_all
from experiments.reproduce.run_folder import finished
from experiments.reproduce.run_result import result_to_json
from reproduce.canned import at_budget, run_result

WORKER = (sys.executable, str(pathlib.Path(__file__).parent / "worker_stand_in.py"))
DONE, FAILS, SLEEPS, DEAF = 1, 2, 3, 4
CONFIG = load_config("smoke")


@pytest.fixture
def root(tmp_path):
    canned = run_result("canned", 0, [at_budget(8.0, 0.5)], 8.0, 0.6)
    (tmp_path / "canned.json").write_text(json.dumps(result_to_json(canned)))
    return tmp_path


def run(kind, seed=0):
    config = dataclasses.replace(CONFIG, seed=seed)
    return Run(f"kind {kind}", config, (4.8,), Amounts(test_examples=kind), "train_and_evaluate")


def begun(one, root):
    """The cores, process id and time of each start of a run."""
    path = root / one.id / "begun.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_all_runs_are_done_in_order_and_only_once(root):
    runs = [run(DONE, seed) for seed in (3, 1, 2)]
    outcome = run_all(runs, root, workers=1, worker=WORKER)
    assert [one.config.seed for one in outcome.done] == [3, 1, 2]
    assert outcome.failed == outcome.left == ()
    starts = [float(begun(one, root)[0][2]) for one in runs]
    assert starts == sorted(starts)
    lines = []
    again = run_all(runs, root, workers=1, worker=WORKER, note=lines.append)
    assert again.done == outcome.done
    assert [len(begun(one, root)) for one in runs] == [1, 1, 1]
    assert lines == ["3 runs, 3 done before, 0 to do, 1 at a time"]


def test_a_failure_stops_nothing_and_is_reported(root):
    runs = [run(FAILS), run(DONE)]
    lines = []
    outcome = run_all(runs, root, workers=1, worker=WORKER, note=lines.append)
    assert outcome.done == (runs[1],)
    assert outcome.failed == ((runs[0], "error: broken on purpose"),)
    assert any(line.startswith("FAILED kind 2") and line.endswith("broken on purpose") for line in lines)


def test_at_the_deadline_no_run_starts_and_running_ones_stop(root):
    runs = [run(SLEEPS), run(DONE)]
    start = time.monotonic()
    outcome = run_all(runs, root, workers=1, deadline=2.0, worker=WORKER)
    assert time.monotonic() - start < 15
    assert outcome.done == outcome.failed == ()
    assert outcome.left == tuple(runs)
    assert begun(runs[1], root) == []
    process = int(begun(runs[0], root)[0][1])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    (root / runs[0].id / "patient.txt").touch()
    assert run_all(runs, root, workers=1, worker=WORKER).done == tuple(runs)


def test_a_run_that_ignores_sigterm_is_killed(root, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.5)
    one = run(DEAF)
    outcome = run_all([one], root, workers=1, deadline=2.0, worker=WORKER)
    assert outcome.left == (one,)
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun(one, root)[0][1]), 0)


def test_simultaneous_runs_have_separate_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 5, 7, 8}, raising=False)
    assert core_shares(5) == [(2,), (3,), (5,), (7,), (8,)]
    assert core_shares(2) == [(2, 3), (5, 7, 8)]
    assert core_shares(1) == [(2, 3, 5, 7, 8)]
    assert core_shares(7)[5:] == [(2,), (3,)]


def test_a_run_to_keep_is_done_only_with_its_checkpoint(root):
    one = run(DONE)
    run_all([one], root, workers=1, worker=WORKER)
    kept = dataclasses.replace(one, keep=True)
    assert finished(one, root) is not None
    assert finished(kept, root) is None
    (root / one.id / "train" / "checkpoints" / "10").mkdir(parents=True)
    assert finished(kept, root) is not None


def test_errors_are_reported(root):
    with pytest.raises(UserError, match="workers=0"):
        run_all([], root, workers=0)
    with pytest.raises(UserError, match="deadline=-1"):
        run_all([], root, workers=1, deadline=-1)
    one = run(DONE)
    (root / one.id).mkdir()
    (root / one.id / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result\.json is not a run's result of this version"):
        run_all([one], root, workers=1, worker=WORKER)
    (root / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        run_all([one], root / "file", workers=1, worker=WORKER)
    unknown = dataclasses.replace(one, recipe="evolve")
    with pytest.raises(UserError, match="recipe='evolve' is unknown; valid: train_and_evaluate"):
        run_all([unknown], root, workers=1, worker=WORKER)
