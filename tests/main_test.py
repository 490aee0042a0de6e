"""How the command starts its process again with large pages."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from anyexperts_jax import __main__, __version__

HERE = ("GLIBC_TUNABLES", "PYTEST_CURRENT_TEST", "PYTHONBREAKPOINT", "ANYEXPERTS_LARGE_PAGES", *__main__.LAUNCHERS)
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(HERE)}


@pytest.fixture
def started(monkeypatch):
    """Records the command that would replace the process, and hides the debugger that pytest has loaded."""
    monkeypatch.setattr(__main__, "WATCHERS", ())
    monkeypatch.setattr(__main__.sys, "gettrace", lambda: None)
    seen = []
    monkeypatch.setattr(__main__.sys, "platform", "linux")
    monkeypatch.setattr(__main__.os, "environ", dict(PLAIN))
    monkeypatch.setattr(__main__.os, "execve", lambda *arguments: seen.append(arguments))
    return seen


def test_the_command_restarts_with_large_pages_and_the_same_arguments(started):
    __main__.restart_with_large_pages()
    ((program, arguments, environment),) = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == sys.orig_argv[1:]
    assert environment == {**__main__.os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert environment.items() >= PLAIN.items(), "other variables are unchanged"


@pytest.mark.parametrize("value", ["", "glibc.malloc.arena_max=1"])
def test_a_user_setting_of_the_variable_wins(started, value):
    __main__.os.environ["GLIBC_TUNABLES"] = value
    __main__.restart_with_large_pages()
    assert not started


def test_on_other_systems_the_command_does_not_restart(started, monkeypatch):
    monkeypatch.setattr(__main__.sys, "platform", "darwin")
    __main__.restart_with_large_pages()
    assert not started


@pytest.mark.parametrize(
    ("variable", "starts"),
    [
        ({}, True),
        ({"PYTHONBREAKPOINT": "ipdb.set_trace"}, False),
        ({"PYTHONBREAKPOINT": "0"}, True),
        ({"OMPI_COMM_WORLD_RANK": "0"}, False),
        ({"PMI_RANK": "1"}, False),
        ({"PMIX_RANK": "1"}, False),
        ({"SLURM_STEP_ID": "0"}, False),
        ({"SLURM_JOB_ID": "7"}, True),  # a batch script's own commands
        ({"ANYEXPERTS_LARGE_PAGES": "0"}, False),
        ({"ANYEXPERTS_LARGE_PAGES": "1", "SLURM_STEP_ID": "0"}, True),
        ({"ANYEXPERTS_LARGE_PAGES": "1", "GLIBC_TUNABLES": ""}, False),
    ],
)
def test_a_watched_or_launched_process_does_not_restart(started, variable, starts):
    __main__.os.environ.update(variable)
    __main__.restart_with_large_pages()
    assert len(started) == starts


@pytest.mark.parametrize("module", ["pydevd", "pdb", "debugpy", "IPython", "ipykernel"])
def test_a_process_with_a_debugger_or_a_notebook_in_it_is_watched(module):
    assert __main__.is_watched([module])


@pytest.mark.parametrize("switch", [sys.settrace, sys.setprofile])
def test_a_process_that_is_traced_is_watched(switch, monkeypatch):
    before = {sys.settrace: sys.gettrace, sys.setprofile: sys.getprofile}[switch]()
    switch(lambda *event: None)
    try:
        assert __main__.is_watched([])
    finally:
        switch(before)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is new in 3.12")
def test_a_process_that_is_monitored_is_watched():
    number = next(number for number in range(6) if sys.monitoring.get_tool(number) is None)
    sys.monitoring.use_tool_id(number, "a debugger")
    try:
        assert __main__.is_watched([])
    finally:
        sys.monitoring.free_tool_id(number)


def test_only_the_command_itself_restarts(started, monkeypatch, capsys):
    """A program that calls `main`, as this test does, is not restarted."""
    monkeypatch.setattr(sys, "argv", ["pytest", "report", "no/such/run"])
    assert __main__.main() == 2
    assert not started
    assert __main__.is_the_command(sys.modules["__main__"], "/usr/bin/anyexperts")
    assert not __main__.is_the_command(sys.modules["__main__"], "/usr/bin/pytest")
    capsys.readouterr()


def test_a_switch_that_is_neither_0_nor_1_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("ANYEXPERTS_LARGE_PAGES", "off")
    assert __main__.main() == 2
    assert capsys.readouterr().err == "anyexperts: ANYEXPERTS_LARGE_PAGES='off' must be 0 (never) or 1 (always)\n"


def test_the_new_process_keeps_the_arguments_and_the_process_id(tmp_path):
    """SIGTERM must reach the run, and its exit code must be the command's."""
    told = subprocess.run(
        [sys.executable, "-m", "anyexperts_jax", "--version"], env=PLAIN, capture_output=True, text=True
    )
    assert told.stdout == f"anyexperts-jax {__version__}\n"
    command = [sys.executable, "-m", "anyexperts_jax", "report", str(tmp_path / "none")]
    process = subprocess.Popen(command, env=PLAIN, stderr=subprocess.PIPE, text=True)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("anyexperts: ")


@pytest.mark.parametrize(
    ("version", "needed", "said"),
    [
        ((3, 10), ("numpy",), "this is Python 3.10, and 3.11 or newer is needed"),
        ((3, 9), ("no_such_module",), "this is Python 3.9, and 3.11 or newer is needed"),
        ((3, 11), ("numpy", "no_such_module"), "no_such_module not installed for "),
        ((3, 13), ("numpy",), ""),
        ((4, 0), ("numpy",), ""),
    ],
)
def test_a_python_that_cannot_run_it_is_named_in_one_line(version, needed, said):
    line = __main__.cannot_start(version, needed)
    assert line.startswith(said)
    assert bool(line) == bool(said)
    assert "\n" not in line


@pytest.mark.parametrize("system", ["win32", "linux", "darwin"])
def test_windows_itself_is_named_in_one_line(system):
    line = __main__.cannot_start((3, 12), ("numpy",), system)
    assert line.startswith("Windows itself is not supported: install WSL 2" if system == "win32" else "")
    assert bool(line) == (system == "win32")


@pytest.mark.parametrize("name", ["__init__", "__main__"])
def test_an_older_python_can_read_what_names_it(name):
    """Annotations such as list[str] end in a traceback on Python 3.8 unless they are not evaluated."""
    text = (pathlib.Path(__main__.__file__).parent / f"{name}.py").read_text()
    ast.parse(text, feature_version=(3, 7))
    assert "from __future__ import annotations" in text


def test_without_its_packages_the_command_ends_in_one_line(tmp_path):
    """`-S -I` runs Python without any installed package."""
    root = str(pathlib.Path(__main__.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from anyexperts_jax.__main__ import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, "train", "smoke"], cwd=tmp_path, capture_output=True
    )
    assert ended.returncode == 2
    assert ended.stderr.decode().count("\n") == 1
    assert ended.stderr.startswith(b"anyexperts: numpy, jax, flax not installed for ")
