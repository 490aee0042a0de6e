"""The command `anyexperts`, and `python -m anyexperts_jax`."""

from __future__ import annotations  # this module runs on older Pythons, to name them

import importlib.util
import os
import sys
from collections.abc import Collection, Mapping

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SWITCH = "ANYEXPERTS_LARGE_PAGES"
# Modules that are loaded before the command only where they watch it: debuggers, profilers, notebooks.
WATCHERS = ("pydevd", "debugpy", "pdb", "bdb", "pudb", "memray", "scalene", "IPython", "ipykernel")
# How the variables begin that launchers of parallel jobs set in each of their processes.
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "MV2_COMM_WORLD_", "SLURM_STEP_", "PALS_", "FLUX_TASK_", "JSM_")


OLDEST = (3, 11)
NEEDED = ("numpy", "jax", "flax")  # of what pip installs beside the package: enough to tell that it did


def main() -> int:
    """Runs a command and returns its exit code."""
    obstacle = cannot_start(sys.version_info[:2])
    if obstacle:
        print(f"anyexperts: {obstacle}", file=sys.stderr)
        return 2
    wish = os.environ.get(SWITCH)
    if wish not in (None, "0", "1"):
        print(f"anyexperts: {SWITCH}={wish!r} must be 0 (never) or 1 (always)", file=sys.stderr)
        return 2
    if is_the_command(sys.modules["__main__"], sys.argv[0]):
        restart_with_large_pages()
    from anyexperts_jax.cli.main import main as run

    return run()


def cannot_start(version: tuple[int, int], needed: Collection[str] = NEEDED, system: str = sys.platform) -> str:
    """Why no command can run in this Python, in one line; empty if it can. Runs on older Pythons too."""
    if system == "win32":
        return "Windows itself is not supported: install WSL 2 (`wsl --install`), and install and run this inside it"
    if version < OLDEST:
        return (
            f"this is Python {version[0]}.{version[1]}, and {OLDEST[0]}.{OLDEST[1]} or newer is needed: "
            "make an environment with a newer one, as in `PYTHON=python3.12 make install`"
        )
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed for {sys.executable}: activate the environment "
            "(`source .venv/bin/activate`), or run `pip install .` in the checkout"
        )
    return ""


def restart_with_large_pages() -> None:
    """On Linux, puts a process in this one's place whose arrays lie in large pages; glibc reads the wish as it starts.

    XLA takes a step's memory anew at every step, and in pages of 4 KiB the kernel hands it out too slowly. Whoever has
    set GLIBC_TUNABLES, to nothing even, decides; so does ANYEXPERTS_LARGE_PAGES, 0 for never and 1 for always. Without
    them a process that something else watches or started as one of several stays as it is.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    wish = os.environ.get(SWITCH)
    if wish == "0" or (wish is None and (is_watched(sys.modules) or is_launched(os.environ))):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **LARGE_PAGES})


def is_the_command(main_module: object, program: str) -> bool:
    """Whether this process was started as the command: a program that calls `main` must not be replaced."""
    spec = getattr(main_module, "__spec__", None)
    as_module = spec is not None and spec.name == f"{__package__}.__main__"
    return as_module or os.path.basename(program) == "anyexperts"


def is_watched(modules: Collection[str]) -> bool:
    """Whether a debugger, a profiler or a notebook looks into this process, and would lose it."""
    traced = sys.gettrace() is not None or sys.getprofile() is not None or _has_monitor()
    own_breakpoint = os.environ.get("PYTHONBREAKPOINT", "0") != "0"
    return traced or own_breakpoint or any(name in modules for name in WATCHERS)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether MPI, Slurm or another launcher started this process as one of several, which it knows by their start."""
    return any(name.startswith(LAUNCHERS) for name in environment)


def _has_monitor() -> bool:
    """Whether a debugger, a profiler or a coverage tool watches by `sys.monitoring`, as of Python 3.12."""
    monitoring = getattr(sys, "monitoring", None)
    return monitoring is not None and any(monitoring.get_tool(number) is not None for number in range(6))


if __name__ == "__main__":
    sys.exit(main())
