import jax
import jax.numpy as jnp
import numpy as np
from models.small import SMALL, small

from anyexperts_jax.nn.block import BlockContext, DenseBlock, MoEBlock
from nn.layers import initial_params, run

B, T, D = 1, 4, 16
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
CONTEXT = BlockContext(jnp.arange(T)[None], jnp.ones((B, T), bool), jnp.asarray(np.tri(T, dtype=bool))[None])


def zeroed(params, *paths):
    """The parameters with the named kernels zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if any(n in jax.tree_util.keystr(path) for n in paths) else p, params
    )


def test_a_block_that_adds_nothing_passes_the_stream():
    block = DenseBlock(SMALL.stack)
    params = zeroed(initial_params(block, X_BTD, CONTEXT), "'out'", "'down'")
    np.testing.assert_array_equal(run(block)(params, X_BTD, CONTEXT)[0], X_BTD)


def test_the_residual_site_scales_the_stream_itself():
    # Attention, experts, shared expert and virtual output add zero, so h (1 + alpha w) remains: alpha = 0.1, and the
    # importance network starts at w = 0.5.
    config = small(moe={"hsm_site": "residual", "virtual_output": "zero"})
    block = MoEBlock(config.stack, config.moe)
    params = zeroed(initial_params(block, X_BTD, CONTEXT), "'out'", "'down'", "w_down_EFD")
    y_BTD, (trace, _) = run(block)(params, X_BTD, CONTEXT)
    np.testing.assert_allclose(y_BTD, 1.05 * X_BTD, rtol=1e-6)
    np.testing.assert_array_equal(trace.importance_BT, 0.5)


def test_the_block_input_site_leaves_the_stream():
    config = small(moe={"virtual_output": "zero"})
    block = MoEBlock(config.stack, config.moe)
    params = zeroed(initial_params(block, X_BTD, CONTEXT), "'out'", "'down'", "w_down_EFD")
    np.testing.assert_array_equal(run(block)(params, X_BTD, CONTEXT)[0], X_BTD)
