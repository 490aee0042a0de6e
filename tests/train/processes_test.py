import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.sharding.mesh import MeshConfig
from anyexperts_jax.train import loop, processes
from anyexperts_jax.train.config import to_json
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.processes import Peers, find_peers, require_alone
from anyexperts_jax.train.run_log import read_records
from anyexperts_jax.train.stops import PeerLostError
from train.stand_in import MODEL, linear_apply, run_config

TESTS = pathlib.Path(__file__).parents[1]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[0-3]", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
GIVEN = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "host:1234"}


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ((None, None, None), {}, None),
        (("2", 1, "host:1234"), {}, Peers(2, 1, "host:1234")),
        ((None, None, None), GIVEN, Peers(4, 2, "host:1234")),
        (("8", None, None), GIVEN, Peers(8, 2, "host:1234")),
        ((None, 0, None), GIVEN, Peers(4, 0, "host:1234")),
        (("1", None, None), GIVEN, None),
        ((None, None, None), SLURM, Peers()),
        (("1", None, None), SLURM, None),
        ((None, None, None), {**SLURM, "SLURM_NTASKS": "1"}, None),
        ((None, None, None), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # in a job's shell, not its step
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, Peers()),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, Peers()),
        (("auto", None, None), {}, Peers()),
    ],
)
def test_options_go_before_the_environment_and_that_before_the_cluster(options, environment, expected):
    assert find_peers(*options, environment) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("2", None, None),
            r"need --process-index \(JAX_PROCESS_ID\) and --coordinator \(JAX_COORDINATOR_ADDRESS\) as",
        ),
        ((None, 0, "host:1"), r"need --processes \(JAX_NUM_PROCESSES\) as well, or --processes auto on a cluster"),
        (("2", 2, "host:1"), r"--process-index=2 must be in \[0, --processes=2\)"),
        (("two", 0, "host:1"), "--processes=two must be a number >= 1, or auto"),
        (("2", 0, "host"), "--coordinator=host must read HOST:PORT"),
        (("2", 0, "host:70000"), "--coordinator=host:70000 must read HOST:PORT"),
        (("auto", 0, None), "--processes auto takes no --process-index"),
        (("1", 3, None), r"need --coordinator"),
    ],
)
def test_an_incomplete_description_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        find_peers(*options, {})


@pytest.mark.parametrize(
    ("processes", "environment", "asked"),
    [
        ("2", {}, "--processes=2"),
        ("auto", {}, "--processes=auto"),
        (None, GIVEN, "JAX_NUM_PROCESSES=4"),
        (None, SLURM, "the environment of a cluster's job"),
        (None, {"TPU_WORKER_HOSTNAMES": "a,b"}, "the environment of a cluster's job"),
    ],
)
def test_several_processes_are_refused_where_one_is_needed(processes, environment, asked):
    with pytest.raises(UserError, match=f"^{asked}: only `train` runs in several .* with --processes 1$"):
        require_alone(processes, environment)
    require_alone("1", environment)


def test_one_process_is_alone():
    require_alone(None, {})
    require_alone(None, {"JAX_NUM_PROCESSES": "1"})
    require_alone(None, {**SLURM, "SLURM_NTASKS": "1"})


@pytest.mark.parametrize("command", ["evolve", "evaluate", "report", "generate"])
def test_commands_for_one_process_refuse_several(command, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert cli.main([command, "nowhere"]) == 2
    assert capsys.readouterr().err.startswith(
        "anyexperts: JAX_NUM_PROCESSES=2: only `train` runs in several processes;"
    )


def test_one_process_agrees_with_itself():
    agreement = processes.Agreement()
    assert agreement.read(agreement.ask(15, True)) == (15, 1)
    assert processes.is_first()
    assert not processes.several()
    processes.require_agreement("the run", {"step": 1}, "")
    processes.wait_for_all("anything")
    assert processes.peer_lost(ValueError("Gloo all-reduce failed")) is None


def test_processes_that_differ_are_listed_with_their_values(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda ours: np.stack([ours, ours, ours + np.array([0, 2])])
    )
    with pytest.raises(UserError, match=r"^the run: step is 7 in process 0 and 9 in 2; share it$"):
        processes.require_agreement("the run", {"seed": 1, "step": 7}, "share it")
    assert processes.peer_lost(ValueError("Gloo all-reduce failed: [pair.cc] Connection closed\nmore")).endswith(
        "closed"
    )
    assert processes.peer_lost(ValueError("shapes do not match")) is None


# ---- in processes of their own ----


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def launch(tmp_path):
    """launch(config, run_dir, count) -> the processes of a run, with one CPU device each.

    hang: (process, CLASS.METHOD): that process stops at the method as if by SIGSTOP.
    """
    started = []

    def launch(config, run_dir, count, *options, model="linear", only=None, hang=(None, "")):
        path = tmp_path / f"config{len(started)}.json"
        path.write_text(to_json(config))
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        }
        run = [
            sys.executable,
            str(TESTS / "train" / "run_process.py"),
            model,
            "train",
            str(path),
            "--run",
            str(run_dir),
        ]
        address = f"127.0.0.1:{free_port()}"
        found = []
        for index in range(count) if only is None else [only]:
            who = ["--processes", str(count), "--process-index", str(index), "--coordinator", address]
            output = open(tmp_path / f"stderr{len(started)}", "w+")  # noqa: SIM115 - closed below
            hangs = {"HANG_IN": hang[1]} if index == hang[0] else {}
            process = subprocess.Popen([*run, *who, *options], env=environment | hangs, stdout=output, stderr=output)
            started.append((process, output))
            found.append(process)
        return found

    yield launch
    for process, output in started:
        process.kill()
        process.wait()
        output.close()


def output_of(tmp_path, number):
    return (tmp_path / f"stderr{number}").read_text()


def wait_for(running, condition, tmp_path):
    while not condition():
        assert all(process.poll() is None for process in running), output_of(tmp_path, 0)
        time.sleep(0.02)


def losses(run_dir):
    path = run_dir / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return {r["step"]: [r["loss"], r["grad_norm"]] for r in records if r["kind"] == "train"}


def checkpoint_steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())


@pytest.mark.slow
def test_a_run_goes_on_in_two_four_and_one_process_as_in_one(tmp_path, launch, monkeypatch, capsys):
    """Two processes, one of which is killed; four, one of which gets SIGTERM; then one, to the end; then evaluation."""
    config = run_config(steps=60, checkpoint_every=10, eval_every=30)
    run, one = tmp_path / "run", tmp_path / "one"
    first = launch(config, run, 2)
    wait_for(first, lambda: checkpoint_steps(run) and len(losses(run)) > 12, tmp_path)
    first[1].kill()
    assert first[0].wait(timeout=300) == PeerLostError.exit_code, output_of(tmp_path, 0)
    assert "anyexperts: another process died (" in output_of(tmp_path, 0).splitlines()[-1]
    killed_at = max(losses(run))
    assert killed_at < 60

    second = launch(config, run, 4)
    wait_for(second, lambda: max(losses(run), default=0) > killed_at, tmp_path)
    second[2].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=300) for process in second] == [143] * 4
    stopped_at = max(checkpoint_steps(run))
    assert killed_at < stopped_at < 60
    lines = [output_of(tmp_path, number).splitlines()[-1] for number in range(2, 6)]
    assert lines[1:] == lines[:-1]
    assert lines[0].startswith(
        f"anyexperts: stopped by SIGTERM after step {stopped_at} of 60; the last good checkpoint"
    )
    shown = [line for line in output_of(tmp_path, 3).splitlines() if "Gloo" not in line]
    assert shown[0].startswith("anyexperts: process 1 of 4 waits for the others at 127.0.0.1:")
    assert shown[1:] == lines[:1]  # nothing else

    monkeypatch.setattr(loop, "model_apply", lambda config, placement: linear_apply)
    train(config, run, progress=False)
    train(config, one, progress=False)
    assert sorted(losses(run)) == list(range(1, 61))
    np.testing.assert_allclose(list(losses(run).values()), list(losses(one).values()), rtol=1e-4)
    monkeypatch.undo()
    assert cli.main(["evaluate", str(run), "--budget", "2", "--examples", "2", "--calibration-examples", "2"]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_experts_on_two_processes_give_the_losses_of_one(tmp_path, launch):
    stack = dataclasses.replace(MODEL.stack, execution=Execution(dispatch="exchange"))
    config = run_config(model=dataclasses.replace(MODEL, stack=stack), steps=3, mesh=MeshConfig(data=1, expert=-1))
    running = launch(config, tmp_path / "run", 2, model="model")
    running += launch(run_config(steps=3), tmp_path / "one", 1, model="model")
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0], output_of(tmp_path, 0)
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    ours, theirs = (list(losses(tmp_path / name).values()) for name in ("run", "one"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_missing_peer_is_one_line_after_a_time_out(tmp_path, launch):
    start = time.monotonic()
    (process,) = launch(run_config(), tmp_path / "run", 2, "--set", "runtime.peer_timeout=2", only=0)
    assert process.wait(timeout=300) == 5
    assert time.monotonic() - start < 200
    waits, waited = output_of(tmp_path, 0).splitlines()
    address = r"127\.0\.0\.1:\d+"
    who = "anyexperts: process 0 of 2"
    assert re.fullmatch(rf"{who} waits for the others at {address}, 2 s at most \(runtime\.peer_timeout\)", waits)
    assert re.match(rf"{who} waited 2 s for the others at {address}; .* let them reach that port, or wait", waited)
    assert waited.endswith("(runtime.peer_timeout)")


@pytest.mark.parametrize(
    ("environment", "port"),
    [
        ({}, "JAX's port of process 0 (port 8482 on TPUs, one from 61440 to 65535 under Slurm; JAX_COORDINATOR_PORT"),
        ({"JAX_COORDINATOR_PORT": "1234"}, "port 1234 of process 0,"),
    ],
)
def test_a_cluster_that_does_not_come_together_says_what_it_waits_for_and_which_port_to_open(environment, port):
    code = """if True:
        import time
        import jax
        jax.distributed.initialize = lambda *who, **how: time.sleep(60)
        from anyexperts_jax.train.processes import Peers, connect
        connect(Peers(), 0.5)
    """
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), **environment}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 5
    waits, waited = ended.stderr.splitlines()
    who, others = "anyexperts: this process", "the others that the cluster names"
    assert waits == f"{who} waits for {others}, 0.5 s at most (runtime.peer_timeout)"
    assert waited.startswith(
        f"{who} waited 0.5 s for {others}; start the same command on every host, let them reach {port}"
    )


def test_the_port_named_for_tpus_is_jaxs():
    from jax._src.clusters.cloud_tpu_cluster import coordinator_port

    assert str(processes.CLOUD_TPU_PORT) == coordinator_port


def test_the_line_is_printed_before_the_wait(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(
        processes.jax.distributed, "initialize", lambda *who, **how: said.append(capsys.readouterr().err)
    )
    monkeypatch.setattr(processes.jax.config, "update", lambda *setting: None)
    processes.connect(Peers(4, 2, "host:1234"), 300.0)
    line = "anyexperts: process 2 of 4 waits for the others at host:1234, 300 s at most (runtime.peer_timeout)\n"
    assert said == [line]


PATIENCE = 8


def require_one_line(process, what, tmp_path, number):
    """`process` exits while another one is stopped, and its last line says what it waited for."""
    assert process.wait(timeout=300) == PeerLostError.exit_code, output_of(tmp_path, number)
    said = output_of(tmp_path, number).splitlines()[-1]
    waited = f"anyexperts: waited {PATIENCE} s (runtime.peer_timeout) for {what}: another process died or hangs; "
    assert re.match(re.escape(waited).replace("NUMBER", r"\d+"), said), said
    assert said.endswith("; run the same command to resume")


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_others_in_one_line(tmp_path, launch):
    """It is stopped in a step, and while a resumed run reads its checkpoint. When it continues, it exits too."""
    # Checkpoints are far apart, so that it is stopped in a step.
    config, run = run_config(steps=20_000, checkpoint_every=200, eval_every=20_000), tmp_path / "run"
    patience = ("--set", f"runtime.peer_timeout={PATIENCE}")
    first = launch(config, run, 2, *patience)
    wait_for(first, lambda: checkpoint_steps(run), tmp_path)
    first[1].send_signal(signal.SIGSTOP)
    require_one_line(first[0], "step NUMBER", tmp_path, 0)
    assert f"the last good checkpoint is {run / 'checkpoints'}" in output_of(tmp_path, 0)
    first[1].send_signal(signal.SIGCONT)
    assert first[1].wait(timeout=300) != 0

    second = launch(config, run, 2, *patience, hang=(0, "Checkpoints.restore"))
    require_one_line(second[1], "the checkpoint of step NUMBER", tmp_path, 3)


@pytest.mark.slow
def test_a_process_that_is_stopped_before_a_checkpoint_ends_the_others_in_one_line(tmp_path, launch):
    patience = ("--set", f"runtime.peer_timeout={PATIENCE}")
    running = launch(run_config(), tmp_path / "run", 2, *patience, hang=(0, "Checkpoints.save"))
    require_one_line(running[1], "the checkpoint of step 3", tmp_path, 1)


def test_a_process_that_hangs_is_ended():
    code = """if True:
        import time
        from anyexperts_jax.train.processes import Watch
        watch = Watch(0.2, lambda what: f"waited for {what}")
        with watch.waiting("step 1"):
            pass
        time.sleep(0.4)
        print("passed", flush=True)
        with watch.waiting("step 2"):
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (5, "passed\n", "anyexperts: waited for step 2\n")
