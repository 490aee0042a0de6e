"""Names of arrays for remat: all of them come from `core.remat`, and every policy saves the selected experts."""

import ast
import pathlib
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import anyexperts_jax
from anyexperts_jax.core import remat

NAMES = {name for name, value in vars(remat).items() if isinstance(value, str) and name.isupper()}
PACKAGE = pathlib.Path(anyexperts_jax.__file__).parent


def test_every_checkpoint_name_is_in_the_table():
    given = [
        ast.unparse(node.args[1])
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "checkpoint_name"
    ]
    assert set(given) == NAMES


@pytest.mark.parametrize("policy", [name for name in get_args(remat.Remat) if name != "none"])
def test_every_policy_saves_the_selected_experts(policy):
    @lambda f: jax.checkpoint(f, policy=remat.remat_policy(policy))
    def layer(x):
        return (x[checkpoint_name(jnp.argsort(x), remat.ROUTING)] ** 2).sum()

    assert str(jax.make_jaxpr(jax.grad(layer))(jnp.arange(4.0))).count("sort[") == 1
