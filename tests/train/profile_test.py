import jax
import jax.numpy as jnp
import pytest

from anyexperts_jax.train.profile import Profiler
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.runtime import RuntimeConfig


@pytest.fixture
def traced(monkeypatch):
    """The calls to JAX's profiler, in order."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path.name))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def steps(profiler, first, last, request_at=None):
    """The calls of the loop; the processes agree on a request after the step in which it is seen."""
    for step in range(first, last + 1):
        profiler.before(step)
        asked = profiler.asked()
        if asked or step == request_at:
            profiler.request()
        if profiler.ends_with(step):
            profiler.close()


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 9, ["step_000004", "stop"]),
        (5, 9, ["step_000005", "stop"]),  # a run that resumes within the range
        (7, 9, []),
        (1, 5, ["step_000004"]),  # stopped within it: whoever stops the run closes the trace
    ],
)
def test_a_range_of_steps_is_traced_once(tmp_path, traced, first, last, expected):
    profiler = Profiler(RuntimeConfig(profile=(4, 6)), RunDir(tmp_path), watches=True)
    steps(profiler, first, last)
    assert traced == expected
    profiler.close()
    assert traced == ([*expected, "stop"] if expected == ["step_000004"] else expected)


def test_a_file_asks_for_the_steps_after_it_as_often_as_it_is_made(tmp_path, traced):
    paths = RunDir(tmp_path)
    profiler = Profiler(RuntimeConfig(profile_steps=2), paths, watches=True)
    steps(profiler, 1, 2)
    paths.profile_request.touch()
    steps(profiler, 3, 8)
    assert traced == ["step_000004", "stop"]
    assert not paths.profile_request.exists()
    paths.profile_request.touch()
    steps(profiler, 9, 12)
    assert traced[2:] == ["step_000010", "stop"]


def test_other_processes_trace_when_told_and_leave_the_file(tmp_path, traced):
    paths = RunDir(tmp_path)
    paths.profile_request.touch()
    profiler = Profiler(RuntimeConfig(profile_steps=1), paths, watches=False)
    steps(profiler, 1, 4, request_at=2)
    assert traced == ["step_000003", "stop"]
    assert paths.profile_request.exists()


def test_a_trace_is_left_in_the_run_directory(tmp_path):
    profiler = Profiler(RuntimeConfig(profile=(2, 2)), RunDir(tmp_path), watches=True)
    profiler.before(2)
    jax.block_until_ready(jnp.ones(8) * 2)
    profiler.close()
    assert list((tmp_path / "profile" / "step_000002").rglob("*.xplane.pb"))
