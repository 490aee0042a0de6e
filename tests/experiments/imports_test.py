"""Every module of `experiments` imports, on a machine without a TPU, a GPU, libtpu, torch or tokamax."""

import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_experiments_imports(name):
    importlib.import_module(name)
