import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import MeshConfig
from anyexperts_jax.train import loop, progress
from anyexperts_jax.train.config import to_json
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.run_log import read_records
from anyexperts_jax.train.runtime import RuntimeConfig
from anyexperts_jax.train.stops import DiskFullError, NonFiniteError, RunInterruptedError
from train.stand_in import linear_apply, run_config

LOSSES = ("loss", "answer_loss", "balance_loss", "importance_loss", "z_loss", "grad_norm")


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module", autouse=True)
def compile_once(compile_cache):
    """Caches compiled programs, which all runs and processes here share."""
    settings = {"jax_compilation_cache_dir": str(compile_cache), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def linear_model(monkeypatch):
    """The loop around a model that compiles at once; the parameters are the real model's."""
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: linear_apply)


def losses(run_dir, kind="train"):
    return {
        r["step"]: [r.get(name) for name in LOSSES]
        for r in read_records(run_dir / "metrics.jsonl")
        if r["kind"] == kind
    }


def checkpoint_steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_a_run_leaves_its_files_and_its_result(tmp_path, linear_model):
    result = train(run_config(), tmp_path / "run", progress=False)
    assert (result.step, result.skipped_steps) == (6, 0)
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert sorted(losses(tmp_path / "run", "validation")) == [3, 6]
    assert {record["dropped_share"] for record in read_records(tmp_path / "run" / "metrics.jsonl")} == {0.0}
    assert checkpoint_steps(tmp_path / "run") == [3, 6]
    assert result.validation["domains"]["nlp"]["examples"] == 8
    assert (tmp_path / "run" / "config.json").read_text() == to_json(run_config())
    for which in ("best", "last"):
        config, params, bias = load_run(tmp_path / "run", which)
        assert config == run_config()
        assert bias.shape == (1, 5)
        assert len(params["tokens"]["table"].devices()) == 1
    again = train(run_config(), tmp_path / "run", progress=False)
    assert again == result


@pytest.mark.slow
def test_slots_that_find_no_room_are_a_share_in_the_log_and_on_the_line_of_a_step(tmp_path, monkeypatch, capsys):
    def apply(*arguments):
        logits, trace = linear_apply(*arguments)
        dropped = trace.real_slots_BT.sum((1, 2)) / 4
        return logits, dataclasses.replace(trace, metrics={**trace.metrics, "dropped": dropped})

    monkeypatch.setattr(loop, "model_apply", lambda config, placement: apply)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    train(run_config(steps=3), tmp_path)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["dropped_share"] for record in records] == [0.25] * 4
    assert "real experts 3.00  dropped 25% of slots" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_tells_where_its_time_goes_and_traces_what_it_is_asked_to(tmp_path, linear_model, capsys):
    cache = tmp_path / "programs"
    runtime = RuntimeConfig(compile_cache=str(cache), profile=(4, 5), profile_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile.request").touch()
    train(dataclasses.replace(run_config(), runtime=runtime), tmp_path / "run")
    records = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    for record in records:
        assert record["time_shares"].keys() == {"step", "start", "compile", "data", "validation", "checkpoint"}
        assert sum(record["time_shares"].values()) == pytest.approx(1)
        assert record["goodput"] == record["time_shares"]["step"] >= 0
    assert [record["step"] for record in records if "step_seconds" in record] == [2, 3, 4, 5, 6]
    assert records[-1]["step_seconds"].keys() == {"median", "p95", "slowest"}
    shown = capsys.readouterr().err
    assert "Goodput" in shown
    assert "seconds per step: median" in " ".join(shown.split())
    traces = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert traces == ["step_000002", "step_000004"]
    assert any(cache.iterdir())


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_with_more_steps_and_on_another_mesh(tmp_path, linear_model, capsys):
    train(run_config(steps=3), tmp_path, progress=False)
    before = losses(tmp_path)
    train(run_config(steps=6, mesh=MeshConfig(data=2, fsdp=4)), tmp_path)
    after = losses(tmp_path)
    assert sorted(after) == [1, 2, 3, 4, 5, 6]
    assert {step: after[step] for step in before} == before
    shown = capsys.readouterr().err
    assert "continuing with train.steps (6, was 3), mesh.data (2, was -1), mesh.fsdp (4, was 1)" in shown
    assert "resuming from the checkpoint of step 3" in shown
    with pytest.raises(UserError, match=r"is at step 6, past train\.steps=3"):
        train(run_config(steps=3), tmp_path, progress=False)


@pytest.mark.slow
def test_a_packed_run_tells_its_padding_and_reads_on_where_it_stopped(tmp_path, linear_model, capsys):
    data = dataclasses.replace(run_config().data, packing="first_fit", packing_window=3, threads=0)
    whole, halves = (tmp_path / name for name in ("whole", "halves"))
    train(run_config(data=data), whole)
    shown = capsys.readouterr().err
    (record,) = [record for record in read_records(whole / "metrics.jsonl") if record["kind"] == "data"]
    assert 0 < record["padding_share"] < record["padding_share_unpacked"] < 1
    share, alone = (f"{100 * record[name]:.1f}%" for name in ("padding_share", "padding_share_unpacked"))
    assert f"packing: {share} of the positions are padding; with one example per row of 96" in shown
    assert f"it would be {alone}" in shown
    train(run_config(data=data, steps=3), halves, progress=False)
    train(run_config(data=data), halves, progress=False)
    tokens = [
        [record["tokens"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "train"]
        for run in (whole, halves)
    ]
    assert tokens[0] == tokens[1]
    assert len({text for text, *_ in tokens[0]}) == 6, "batches differ in their tokens"
    assert read_records(halves / "metrics.jsonl")[-1]["domains"]["nlp"]["examples"] == 8, "evaluation is not packed"
    with pytest.raises(UserError, match=r"data\.packing \('none', was 'first_fit'\)"):
        train(run_config(), whole, progress=False)


def test_a_directory_of_another_run_is_refused_and_kept(tmp_path, linear_model):
    train(run_config(steps=3), tmp_path, progress=False)
    with pytest.raises(UserError, match=r"the run in .* is of another configuration: seed \(1, was 0\)"):
        train(run_config(steps=3, seed=1), tmp_path, progress=False)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run directory"):
        train(run_config(), tmp_path / "file", progress=False)


def test_batches_that_do_not_split_are_refused_and_leave_nothing(tmp_path, linear_model):
    with pytest.raises(UserError, match="= 4 does not split over the mesh's 8 batch shards"):
        train(run_config(accumulation=2, steps=3), tmp_path, progress=False)
    assert not (tmp_path / "config.json").exists(), "a run that cannot start leaves nothing behind"
    assert train(run_config(steps=3), tmp_path, progress=False).step == 3
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl has lost its validation records"):
        train(run_config(steps=3), tmp_path, progress=False)


def nan_in_step(poisoned):
    """A model whose answer loss is NaN while its step's learning rate is that of step `poisoned` (1-based)."""

    def apply(params, batch, router_bias_LC, key, window):
        logits, trace = linear_apply(params, batch, router_bias_LC, None, window)
        return jnp.where(jnp.any(jnp.asarray(batch.example_B) == poisoned), jnp.nan, logits), trace

    return apply


def example_of_step(step):
    """An example that only training step `step` (1-based) of the first six uses."""
    iterator = loop.train_iterator(run_config().data, 8)
    return [int(np.asarray(next(iterator).example_B)[0]) for _ in range(6)][step - 1]


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    poisoned = nan_in_step(example_of_step(5))
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: poisoned)
    iterator, closed = loop.train_iterator(run_config().data, 8), []
    monkeypatch.setattr(iterator, "close", lambda: closed.append(True))
    monkeypatch.setattr(loop, "train_iterator", lambda *which, **how: iterator)
    message = r"^step 5: answer_loss is nan; the last good checkpoint is .*checkpoints/3; lower optim\.lr"
    with pytest.raises(NonFiniteError, match=message) as error:
        train(run_config(), tmp_path, progress=False)
    assert error.value.exit_code == 3
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert losses(tmp_path, "nonfinite").keys() == {5}
    assert closed  # its workers end with it; they would keep the process alive for seconds


def test_a_step_that_is_not_finite_is_skipped_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: nan_in_step(example_of_step(5)))
    result = train(run_config(on_nonfinite="skip"), tmp_path)
    assert result.skipped_steps == 1
    assert losses(tmp_path)[5][0] is None
    assert np.isfinite(losses(tmp_path)[6]).all()
    assert checkpoint_steps(tmp_path) == [3, 6]
    shown = capsys.readouterr().err
    assert "step 5 skipped: answer_loss is nan" in shown
    assert "1 steps were not finite and skipped" in shown


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, linear_model, monkeypatch, caplog):
    train(run_config(steps=3), tmp_path, progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    message = (
        rf"^cannot write to {tmp_path}: No space left on device; the last good checkpoint is .*/3; free some space"
    )
    with pytest.raises(DiskFullError, match=message) as error:
        train(run_config(), tmp_path, progress=False)
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)
    assert not caplog.records
    monkeypatch.undo()
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: linear_apply)
    assert train(run_config(), tmp_path, progress=False).step == 6


def test_a_disk_that_is_full_from_the_start_is_the_same_line(tmp_path, linear_model, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.new").symlink_to("/dev/full")  # what config.json is written to first
    (tmp_path / "run.json").write_text(to_json(run_config()))
    assert cli.main(["train", str(tmp_path / "run.json"), "--run", str(tmp_path / "run")]) == 4
    assert capsys.readouterr().err == (
        f"anyexperts: cannot write to {tmp_path}/run: No space left on device; there is no checkpoint yet; "
        "free some space and run it again\n"
    )


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path, linear_model):
    (tmp_path / "config.json.new").mkdir()
    with pytest.raises(UserError, match=f"^cannot write to the run directory {tmp_path}: Is a directory$"):
        train(run_config(), tmp_path, progress=False)


def test_load_run_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*nothing"):
        load_run(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in .*; the run stopped before it wrote one"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="which='newest' is unknown; valid: best, last"):
        load_run(tmp_path, "newest")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, linear_model, number):
    def interrupt():
        while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RunInterruptedError) as error:
        train(run_config(steps=100_000, checkpoint_every=50_000, eval_every=50_000), tmp_path, progress=False)
    thread.join()
    (step,) = checkpoint_steps(tmp_path)
    assert str(error.value) == (
        f"stopped by {number.name} after step {step} of 100000; the last good checkpoint is "
        f"{tmp_path}/checkpoints/{step}; run the same command to resume"
    )
    assert error.value.exit_code == 128 + number
    assert max(losses(tmp_path)) == step


# ---- in processes of their own ----


@pytest.fixture
def start(tmp_path, compile_cache):
    """start(config, *run_dirs) -> the process that trains them one after the other; compiled programs are shared."""
    processes = []

    def start(config, *run_dirs):
        path = tmp_path / "config.json"
        path.write_text(to_json(config))
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        }
        script = pathlib.Path(__file__).with_name("run_training.py")
        command = [sys.executable, str(script), str(path), *map(str, run_dirs)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_go_on_bit_for_bit(tmp_path, start):
    """The first process is killed, the second finds the disk full, the third finishes that run and an uninterrupted
    one."""
    config = run_config(steps=200, checkpoint_every=20, eval_every=100)
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    process = start(config, broken)
    wait_for(process, lambda: (broken / "checkpoints" / "20").exists() and len(losses(broken)) > 24)
    process.kill()
    process.wait()
    killed_at = max(losses(broken))
    assert killed_at < 200

    process = start(config, broken)
    wait_for(process, lambda: max(checkpoint_steps(broken)) > killed_at)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))  # less than a checkpoint's arrays need
    shown = process.communicate()[1]
    last = max(checkpoint_steps(broken))
    assert process.returncode == 4, shown
    assert "resuming from the checkpoint of step" in shown
    message = f"cannot write to {broken}: File too large; the last good checkpoint is {broken}/checkpoints/{last}"
    assert shown.splitlines()[-1].startswith(message)
    assert last < 200

    process = start(config, broken, unbroken)
    shown = process.communicate()[1]
    assert process.returncode == 0, shown
    assert f"resuming from the checkpoint of step {last}" in shown
    assert sorted(losses(broken)) == list(range(1, 201))
    assert losses(broken) == losses(unbroken)
    ends = [read_records(run / "metrics.jsonl")[-1] for run in (broken, unbroken)]
    assert ends[0]["kind"] == "validation"
    assert ends[0] == ends[1]
