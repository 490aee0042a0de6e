"""The command as a process."""

import os
import subprocess
import sys

import pytest

from anyexperts_jax import __main__, __version__

HERE = ("GLIBC_TUNABLES", "PYTEST_CURRENT_TEST")
PLAIN = {name: value for name, value in os.environ.items() if name not in HERE}


@pytest.fixture
def started(monkeypatch):
    """What the process is replaced by, in place of being replaced."""
    seen = []
    monkeypatch.setattr(__main__.sys, "platform", "linux")
    monkeypatch.setattr(__main__.os, "environ", dict(PLAIN))
    monkeypatch.setattr(__main__.os, "execve", lambda *arguments: seen.append(arguments))
    return seen


def test_it_starts_again_with_large_pages_and_the_same_arguments(started):
    __main__.restart_with_large_pages()
    ((program, arguments, environment),) = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == sys.orig_argv[1:]
    assert environment == {**__main__.os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert environment.items() >= PLAIN.items(), "the rest stays as it was"


@pytest.mark.parametrize("value", ["", "glibc.malloc.arena_max=1"])
def test_whoever_sets_the_variable_decides(started, value):
    __main__.os.environ["GLIBC_TUNABLES"] = value
    __main__.restart_with_large_pages()
    assert not started


def test_elsewhere_it_goes_on_as_it_is(started, monkeypatch):
    monkeypatch.setattr(__main__.sys, "platform", "darwin")
    __main__.restart_with_large_pages()
    assert not started


def test_the_new_process_has_the_old_ones_arguments_and_number(tmp_path):
    """Whoever sends it SIGTERM must reach the run, and its exit code is the command's."""
    told = subprocess.run(
        [sys.executable, "-m", "anyexperts_jax", "--version"], env=PLAIN, capture_output=True, text=True
    )
    assert told.stdout == f"anyexperts-jax {__version__}\n"
    command = [sys.executable, "-m", "anyexperts_jax", "report", str(tmp_path / "none")]
    process = subprocess.Popen(command, env=PLAIN, stderr=subprocess.PIPE, text=True)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("anyexperts: ")
