"""Every test runs on eight fake CPU devices; annotated shapes and dtypes are checked at every call.

Unless a device is asked for: `pytest -m gpu` and `pytest -m tpu` run the tests of that marker on what JAX finds, and
skip them where it finds something else.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of LLVM: most programs run once; in processes below too
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax
import pytest
from jaxtyping import install_import_hook

_hook = install_import_hook("anyexperts_jax", "typecheck.check")
_fast = jax.config.read("jax_disable_most_optimizations")
DEVICES = ("gpu", "tpu")


def pytest_configure(config):
    if config.option.markexpr in DEVICES and jax.config.jax_platforms == "cpu":
        jax.config.update("jax_platforms", None)  # JAX looks for itself


def pytest_runtest_setup(item):
    as_shipped = any(item.get_closest_marker(name) for name in ("aot", *DEVICES))
    jax.config.update("jax_disable_most_optimizations", not as_shipped and _fast)
    for device in DEVICES:
        if item.get_closest_marker(device) and jax.default_backend() != device:
            pytest.skip(f"needs a {device.upper()} and `pytest -m {device}`; this runs on {jax.default_backend()}")
