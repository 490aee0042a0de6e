"""Every test runs on eight fake CPU devices; annotated shapes and dtypes are checked at every call.

Unless a device is asked for: `pytest -m gpu` and `pytest -m tpu` run the tests of that marker on what JAX finds, and
skip them where it finds something else.
"""

import gc
import itertools
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of LLVM: most programs run once; in processes below too
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")  # users may have both on: nothing of ours may rely on less
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax
import pytest
from jaxtyping import install_import_hook
from selection import of_cases, of_part

_hook = install_import_hook("anyexperts_jax", "typecheck.check")
_fast = jax.config.read("jax_disable_most_optimizations")
_tests = itertools.count()
DEVICES = ("gpu", "tpu")
MAPPED_REGIONS = 30_000  # of 65530 that Linux lets a process have: every compiled program takes some, and JAX keeps all


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="of every parametrised test run this many cases, spread evenly")
    parser.addoption("--part", metavar="I/N", help="run one of N parts of the tests, I from 0")
    parser.addoption("--docs-slow", action="store_true", help="run the documentation's blocks marked slow, and train")
    parser.addoption("--fuzz-cases", type=int, default=12, help="of every test in tests/fuzz run this many cases")


def pytest_collection_modifyitems(config, items):
    kept = of_cases(items, config.getoption("cases"))
    kept &= of_part(items, config.getoption("part"))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure(config):
    gc.set_threshold(50_000, 20, 20)  # jaxprs are many small objects that stay: 5% of the time went into visiting them
    if config.option.markexpr in DEVICES and jax.config.jax_platforms == "cpu":
        jax.config.update("jax_platforms", None)  # JAX looks for itself
    # Many tests compile the same program. A folder for this process alone: two that write one file would read halves.
    config.programs = tempfile.mkdtemp(prefix="anyexperts_tests_")
    jax.config.update("jax_compilation_cache_dir", config.programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure(config):
    shutil.rmtree(config.programs, ignore_errors=True)


def pytest_runtest_setup(item):
    if next(_tests) % 20 == 0:
        _forget_programs_before_there_are_too_many()
    as_shipped = any(item.get_closest_marker(name) for name in ("aot", *DEVICES))
    jax.config.update("jax_disable_most_optimizations", not as_shipped and _fast)
    for device in DEVICES:
        if item.get_closest_marker(device) and jax.default_backend() != device:
            pytest.skip(f"needs a {device.upper()} and `pytest -m {device}`; this runs on {jax.default_backend()}")


def _forget_programs_before_there_are_too_many():
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPPED_REGIONS:
        jax.clear_caches()
