"""One command at a time writes to a run's directory; a dead holder blocks no one."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evaluate.evaluate import evaluate
from anyexperts_jax.report.page import report
from anyexperts_jax.train import run_lock as module
from anyexperts_jax.train.config import to_json
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import TRAIN_LOCK
from anyexperts_jax.train.run_lock import Owner, run_lock
from train.stand_in import run_config

HOLD = """
import pathlib, sys, time
from anyexperts_jax.train.run_lock import run_lock
with run_lock(pathlib.Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock as if it were training."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_command_is_refused_in_one_line_that_names_the_first(tmp_path, holder):
    said = (
        rf"^{tmp_path} is in use by `anyexperts train`, process {holder.pid} on \S+, since \d{{4}}-\d\d-\d\d .*; wait"
    )
    with pytest.raises(UserError, match=said) as error, run_lock(tmp_path, "train"):
        pass
    assert "\n" not in str(error.value)
    with run_lock(tmp_path, "evaluate"):
        assert holder.poll() is None, "other files have locks of their own"
    assert [path.name for path in tmp_path.iterdir()] == [TRAIN_LOCK]


def test_a_kill_leaves_no_obstacle(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / TRAIN_LOCK).exists()
    with run_lock(tmp_path, "train"):
        assert json.loads((tmp_path / TRAIN_LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_second_thread_is_refused_too(tmp_path):
    with (
        run_lock(tmp_path, "train", "evolve"),
        pytest.raises(UserError, match=f"`anyexperts evolve`, process {os.getpid()} on"),
        run_lock(tmp_path, "train"),
    ):
        pass


def leave(root, **fields):
    """Writes a lock file as a former holder leaves it."""
    owner = Owner("train", 4194304, "elsewhere", "2026-01-01 00:00:00")  # above any process id of Linux
    path = root / TRAIN_LOCK
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(owner, **fields))))
    return path


def test_a_holder_on_another_host_counts_until_it_is_silent_for_a_minute(tmp_path):
    path = leave(tmp_path)
    said = (
        r"on elsewhere, since 2026-01-01 00:00:00; this host cannot tell whether .* is \d+ s old\. If .* again in 60 s$"
    )
    with pytest.raises(UserError, match=said), run_lock(tmp_path, "train"):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere", "a refused process changes nothing"
    os.utime(path, (time.time() - 61, time.time() - 61))
    with run_lock(tmp_path, "train"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOLCK])
def test_where_the_file_system_has_no_locks_a_live_process_counts_and_a_dead_one_does_not(tmp_path, monkeypatch, error):
    def refuse(descriptor, how):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    here = module.socket.gethostname()
    leave(tmp_path, host=here, pid=os.getppid())
    with pytest.raises(UserError, match=f"process {os.getppid()} on {here}"), run_lock(tmp_path, "train"):
        pass
    leave(tmp_path, host=here)
    with run_lock(tmp_path, "train"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "5", '{"pid": 1}', "\0" * 9])
def test_a_file_that_is_no_lock_of_ours_is_taken_over(tmp_path, text):
    (tmp_path / TRAIN_LOCK).write_text(text)
    with run_lock(tmp_path, "train"):
        assert json.loads((tmp_path / TRAIN_LOCK).read_text())["command"] == "train"


def test_directories_made_for_nothing_are_removed(tmp_path):
    with run_lock(tmp_path / "a" / "b", "train"):
        assert (tmp_path / "a" / "b" / TRAIN_LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "config.json").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]


def test_a_directory_that_cannot_be_made_or_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot make the run directory"), run_lock(root, "train"):
            pass
    (tmp_path / TRAIN_LOCK).mkdir()
    with (
        pytest.raises(UserError, match=f"cannot write to the run directory {tmp_path}: Is a directory"),
        run_lock(tmp_path, "train"),
    ):
        pass


def test_a_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.01)
    with run_lock(tmp_path, "train"):
        os.utime(tmp_path / TRAIN_LOCK, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / TRAIN_LOCK).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / TRAIN_LOCK).stat().st_mtime > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "run_lock"]


def test_a_waiting_process_locks_the_new_file_and_not_the_deleted_one(tmp_path, monkeypatch):
    """The holder deletes its file after another process has opened it and before that one locks it."""
    take, calls = module._take, []

    def removed_first(root, descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / TRAIN_LOCK).unlink()
        take(root, descriptor)

    monkeypatch.setattr(module, "_take", removed_first)
    with run_lock(tmp_path, "train"):
        assert len(calls) == 2
        with (tmp_path / TRAIN_LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_every_command_that_writes_into_a_run_is_refused_beside_its_like(tmp_path):
    """The running process is not disturbed."""
    config = run_config()
    (tmp_path / "config.json").write_text(to_json(config))
    for writes, command in (
        ("train", lambda: train(config, tmp_path, progress=False)),
        ("evaluate", lambda: evaluate(tmp_path)),
        ("report", lambda: report(tmp_path)),
    ):
        with run_lock(tmp_path, writes), pytest.raises(UserError, match=f"is in use by `anyexperts {writes}`"):
            command()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
