import jax
import jax.numpy as jnp
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.runtime import RuntimeConfig, compile_cache


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.compile_cache=3", "key runtime.compile_cache=3 must be"),
        ('runtime.compile_cache=""', "runtime.compile_cache='' must be a directory, or none"),
        ("runtime.profile=[5]", r"runtime.profile=\[5\] must be \[first, last\]"),
        ("runtime.profile=[0, 3]", r"runtime.profile=\[0, 3\] must be"),
        ("runtime.profile=[5, 3]", r"runtime.profile=\[5, 3\] must be"),
        ("runtime.profile_steps=0", "runtime.profile_steps=0 must be >= 1"),
        ("runtime.peer_timeout=0.5", "runtime.peer_timeout=0.5 must be >= 1 second"),
        ("runtime.cache=x", "unknown key runtime.cache; valid: compile_cache, profile"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config("smoke", [override])


def test_values_are_read_and_none_switches_off():
    changes = ["runtime.compile_cache=/tmp/programs", "runtime.profile=[10, 12]", "runtime.peer_timeout=60"]
    assert load_config("smoke", changes).runtime == RuntimeConfig("/tmp/programs", (10, 12), 3, 60.0)
    assert load_config("smoke", ["runtime.compile_cache=none", "runtime.profile=none"]).runtime == RuntimeConfig()


@pytest.fixture
def every_program():
    """Makes JAX cache programs that compile quickly too."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


def test_programs_are_kept_in_the_directory_and_jax_is_left_as_it_was(tmp_path, every_program):
    before = jax.config.values["jax_compilation_cache_dir"]
    directory = tmp_path / "programs"
    with compile_cache(str(directory)):
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    kept = sorted(path.name for path in directory.iterdir())
    assert kept
    assert jax.config.values["jax_compilation_cache_dir"] == before
    jax.jit(lambda x: x * 5 + 1)(jnp.ones(7))
    assert sorted(path.name for path in directory.iterdir()) == kept
    with compile_cache(None):
        assert jax.config.values["jax_compilation_cache_dir"] == before
