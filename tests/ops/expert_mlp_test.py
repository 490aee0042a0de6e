import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.expert_mlp import expert_mlp

E, C, D, F = 3, 8, 5, 4
IMPLEMENTATIONS = ("reference", "xla")


def make_operands(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((E, C, D), (E, D, F), (E, D, F), (E, F, D))
    x, *weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return x, jnp.array([8, 0, 3], jnp.int32), *weights


def expected(x, counts, w_gate, w_up, w_down):
    """Row by row in float64."""
    y = np.zeros(x.shape, np.float64)
    for e, count in enumerate(np.asarray(counts)):
        for c in range(min(count, x.shape[1])):
            row, gate_w, up_w, down_w = (np.asarray(a, np.float64) for a in (x[e, c], w_gate[e], w_up[e], w_down[e]))
            gate = row @ gate_w
            y[e, c] = (gate / (1 + np.exp(-gate)) * (row @ up_w)) @ down_w
    return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation):
    operands = make_operands()
    np.testing.assert_allclose(expert_mlp(*operands, implementation), expected(*operands), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dead_rows_may_hold_anything(implementation):
    x, counts, *weights = make_operands()
    dead = jnp.arange(C)[None] >= counts[:, None]
    poisoned = jnp.where(dead[..., None], jnp.nan, x)

    def total(x, *weights):
        y = expert_mlp(x, counts, *weights, implementation)
        return jnp.sin(y).sum(), y

    (_, y), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(poisoned, *weights)
    (_, clean_y), clean_gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(x, *weights)
    assert not np.any(y[dead])
    assert not np.any(gradients[0][dead])
    chex.assert_trees_all_equal((y, gradients), (clean_y, clean_gradients))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_gradients_of_both_implementations_agree(dtype):
    x, counts, *weights = make_operands(dtype)

    def gradients(implementation):
        def total(x, *weights):
            return jnp.sin(expert_mlp(x, counts, *weights, implementation).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(total, (0, 1, 2, 3)))(x, *weights)

    tolerance = 1e-5 if dtype == np.float32 else 0.02  # bfloat16 rounds gate, up and their gradients once each
    for a, b in zip(gradients("xla"), gradients("reference"), strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_counts_past_the_buffer_mean_all_rows():
    x, _, *weights = make_operands()
    full = jnp.full(E, C, jnp.int32)
    np.testing.assert_array_equal(expert_mlp(x, full + 5, *weights), expert_mlp(x, full, *weights))


def test_errors_name_value_and_rule():
    x, counts, *weights = make_operands()
    valid = "reference, xla, pallas_tpu, pallas_gpu, pallas_triton"
    with pytest.raises(UserError, match=f"^implementation='cuda' is unknown; valid: {valid}$"):
        expert_mlp(x, counts, *weights, "cuda")
    with pytest.raises(UserError, match=r"^w_gate_EDF is float32 and x is bfloat16; cast one of them$"):
        expert_mlp(x.astype(jnp.bfloat16), counts, *weights)
