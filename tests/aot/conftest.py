import pytest

from anyexperts_jax.aot import topology


@pytest.fixture(scope="session")
def schedules(tmp_path_factory):
    """Where libtpu writes its schedules; it is told once, before its first use."""
    if not topology.has_compiler():
        pytest.skip("libtpu is not installed (extra `aot`)")
    directory = tmp_path_factory.mktemp("schedules")
    topology.open_compiler(directory)
    return directory
