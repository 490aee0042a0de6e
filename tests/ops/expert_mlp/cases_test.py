"""The shared cases on the implementations that run anywhere."""

import functools

import jax.numpy as jnp
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.expert_mlp import expert_mlp
from tests.ops.expert_mlp.cases import COUNTS, check, make_operands, run


@pytest.mark.parametrize("residuals", ["saved", "recomputed"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_values_and_gradients(implementation, residuals):
    operands = make_operands(COUNTS["around a block"], width=24, hidden=20)
    op = functools.partial(expert_mlp, implementation=implementation, residuals=residuals)
    clean = operands._replace(d_y_ECD=jnp.nan_to_num(operands.d_y_ECD), x_ECD=jnp.nan_to_num(operands.x_ECD))
    check(run(op, clean), clean)


def test_errors_name_value_and_rule():
    x, counts, *weights, _ = make_operands((1, 2))
    with pytest.raises(UserError, match=r"^residuals='all' is unknown; valid: saved, recomputed$"):
        expert_mlp(x, counts, *weights, residuals="all")
    message = r"^implementation='pallas_tpu' needs a TPU and the platform is 'cpu'; use implementation='xla'$"
    with pytest.raises(UserError, match=message):
        expert_mlp(x, counts, *weights, "pallas_tpu")
