"""Measures how much host memory this process can still allocate."""

import pathlib

import psutil

_CGROUPS = pathlib.Path("sys/fs/cgroup")
_NO_LIMIT = 2**60  # cgroup version 1 writes a number near 2^63 for "no limit"


def available_bytes(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Memory that is free or can be reclaimed at once, within the cgroup limits of containers and Slurm jobs.

    Args:
      root: of the file system that holds the cgroup files; tests pass their own.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups(root)])


def _left_in_cgroups(root: pathlib.Path) -> list[int]:
    """Bytes left in each cgroup around this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux, or no /proc
        return []
    left = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version_2 = controllers == ""
        if not version_2 and "memory" not in controllers.split(","):
            continue
        top = root / _CGROUPS if version_2 else root / _CGROUPS / "memory"
        names = ("memory.max", "memory.current", "inactive_file")
        if not version_2:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        inside = top / path.lstrip("/")
        for group in (inside, *inside.parents):
            if group == top or top in group.parents:
                left += _left_in(group, *names)
    return left


def _left_in(group: pathlib.Path, limit: str, usage: str, cache: str) -> list[int]:
    """The limit minus the memory in use, not counting page cache that can be dropped. Empty if there is no limit.

    In a container the cgroup path may exist on the host only; such a folder is skipped.
    """
    try:
        text = (group / limit).read_text().strip()
        if not text.isdecimal() or int(text) >= _NO_LIMIT:
            return []
        used = int((group / usage).read_text())
        numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [max(0, int(text) - used + int(numbers.get(cache, 0)))]
