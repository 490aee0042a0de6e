"""The command `anyexperts`, and `python -m anyexperts_jax`."""

import os
import sys

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main() -> int:
    """Runs a command and returns its exit code."""
    restart_with_large_pages()
    from anyexperts_jax.cli.main import main as run

    return run()


def restart_with_large_pages() -> None:
    """On Linux, puts a process in this one's place whose arrays lie in large pages; glibc reads the wish as it starts.

    XLA takes a step's memory anew at every step, and in pages of 4 KiB the kernel hands it out too slowly. Whoever has
    set GLIBC_TUNABLES, to nothing even, decides.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **LARGE_PAGES})


if __name__ == "__main__":
    sys.exit(main())
