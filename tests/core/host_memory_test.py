import types

import pytest

from anyexperts_jax.core import host_memory

FREE = 1000


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Fakes the cgroup files of a machine with FREE bytes: {file: text} -> available bytes."""
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=FREE))

    def available(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return host_memory.available_bytes(tmp_path)

    return available


def group(folder, limit, used, cache):
    top = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {f"{top}/memory.max": limit, f"{top}/memory.current": used, f"{top}/memory.stat": f"inactive_file {cache}\n"}


def test_without_cgroups_the_machines_memory_counts(machine):
    assert machine({}) == FREE


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (group("", "500\n", "300\n", 0), 200),  # a container sees itself at the top
        (group("", "500\n", "300\n", 100), 300),  # page cache goes when it is asked for
        (group("", "max\n", "300\n", 0), FREE),
        (group("", "500\n", "700\n", 0), 0),
        (group("", "50000\n", "300\n", 0), FREE),
        ({}, FREE),
    ],
)
def test_a_containers_limit_counts(machine, files, left):
    assert machine({"proc/self/cgroup": "0::/\n", **files}) == left


def test_the_tightest_of_nested_groups_counts(machine):
    files = group("job", "400\n", "100\n", 0) | group("job/step", "max\n", "100\n", 0) | group("", "900\n", "800\n", 0)
    assert machine({"proc/self/cgroup": "0::/job/step\n", **files}) == 100
    assert machine({"sys/fs/cgroup/memory.max": "max\n"}) == 300


def test_version_1_has_other_names(machine):
    top = "sys/fs/cgroup/memory/docker/abc"
    files = {
        "proc/self/cgroup": "11:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n0::/\n",
        f"{top}/memory.limit_in_bytes": "600\n",
        f"{top}/memory.usage_in_bytes": "500\n",
        f"{top}/memory.stat": "cache 9\ntotal_inactive_file 50\n",
    }
    assert machine(files) == 150
    assert machine({f"{top}/memory.limit_in_bytes": "9223372036854771712\n"}) == FREE


def test_this_machine_has_available_memory():
    assert host_memory.available_bytes() > 2**20
