"""JAX and libtpu come in pairs: a mismatched pair is rejected before anything is compiled."""

import importlib.metadata

import pytest

from anyexperts_jax.aot import libtpu
from anyexperts_jax.aot.step import compile_step
from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.config import load_config


def installed(monkeypatch, jax, pin, found):
    """Pretends that these are installed: JAX, the libtpu that its metadata pins, and a libtpu."""
    versions = {"jax": jax, "libtpu": found}
    requirements = ["numpy>=2.0", f'libtpu=={pin}.*; extra == "tpu"', 'requests; extra == "tpu"']
    monkeypatch.setattr(libtpu, "has_libtpu", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)


@pytest.mark.parametrize(
    ("jax", "pin", "found"),
    [
        ("0.10.2", "0.0.42", "0.0.42.1"),
        ("0.10.2", "0.0.42", "0.0.42"),
        ("0.12.0.1", "0.0.50", "0.0.50.3"),
        ("0.12.0.1", "0.0.50", "0.0.52"),
    ],
)
def test_the_pinned_libtpu_and_tested_newer_ones_are_accepted(jax, pin, found, monkeypatch):
    installed(monkeypatch, jax, pin, found)
    libtpu.require_libtpu()


@pytest.mark.parametrize(
    ("jax", "pin", "found"),
    [("0.10.2", "0.0.42", "0.0.52"), ("0.10.2", "0.0.42", "0.0.4"), ("0.10.2", "0.0.4", "0.0.42.1")],
)
def test_another_libtpu_is_refused_with_the_one_to_install(jax, pin, found, monkeypatch, capsys):
    installed(monkeypatch, jax, pin, found)
    assert cli.main(["compile", "smoke", "--topology", "v5e:2x4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"libtpu {found} does not fit JAX {jax}, whose own is {pin}" in said
    assert said.endswith(f"pip install 'libtpu=={pin}.*'")


def test_a_jax_that_pins_no_libtpu_is_accepted(monkeypatch):
    installed(monkeypatch, "0.12.0.dev1", "0.0.50", "0.0.53.dev2")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    libtpu.require_libtpu()


def test_the_installed_jax_pins_a_libtpu():
    assert libtpu.own_release(importlib.metadata.requires("jax")).startswith("0.0.")


@pytest.mark.aot
@pytest.mark.usefixtures("schedules")
def test_the_pair_compiles_a_step_that_exchanges():
    """With a mismatched pair, libtpu 0.0.52 and JAX 0.10.2, this step ends in an internal XLA error."""
    settings = ["mesh.data=1", "mesh.expert=4", "model.stack.execution.dispatch=exchange", "model.stack.num_layers=2"]
    step = compile_step(load_config("smoke", settings), "v5p:2x2x1")
    assert {(row.kind, row.axes) for row in step.collectives} >= {("all-to-all", ("expert",))}


def test_a_missing_libtpu_is_refused_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(libtpu, "has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"^libtpu is not installed; in a checkout, pip install"):
        libtpu.require_libtpu()
