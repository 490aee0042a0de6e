import pytest

from anyexperts_jax.aot import topology
from anyexperts_jax.aot.libtpu import has_libtpu


@pytest.fixture(scope="session")
def schedules(tmp_path_factory):
    """The directory where libtpu dumps its schedules; set once, before its first use."""
    if not has_libtpu():
        pytest.skip("libtpu is not installed (extra `aot`)")
    directory = tmp_path_factory.mktemp("schedules")
    topology.open_compiler(directory)
    return directory
