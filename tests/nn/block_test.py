import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.nn.block import BlockContext, DenseBlock, MoEBlock
from models.small import SMALL, small

B, T, D = 1, 4, 16
X_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
CONTEXT = BlockContext(
    jnp.arange(T)[None], jnp.ones((B, T), bool), jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
)


def zeroed(params, *paths):
    """The parameters with the named kernels zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if any(n in jax.tree_util.keystr(path) for n in paths) else p, params
    )


def initial(block):
    params = block.init(jax.random.key(1), X_BTD, CONTEXT)["params"]
    return jax.tree.map(lambda b: b.value, params, is_leaf=lambda n: hasattr(n, "names"))


def test_a_block_that_adds_nothing_passes_the_stream():
    block = DenseBlock(SMALL.stack)
    params = zeroed(initial(block), "'out'", "'down'")
    np.testing.assert_array_equal(block.apply({"params": params}, X_BTD, CONTEXT)[0], X_BTD)


def test_the_residual_site_scales_the_stream_itself():
    # Everything added is zero (attention, experts, shared expert; virtual output zero), so what leaves is h (1 + alpha w)
    # with alpha = 0.1 and w = 0.5, the importance network's start.
    config = small(moe={"hsm_site": "residual", "virtual_output": "zero"})
    block = MoEBlock(config.stack, config.moe)
    params = zeroed(initial(block), "'out'", "'down'", "w_down_EFD")
    y_BTD, (trace, _) = block.apply({"params": params}, X_BTD, CONTEXT)
    np.testing.assert_allclose(y_BTD, 1.05 * X_BTD, rtol=1e-6)
    np.testing.assert_array_equal(trace.importance_BT, 0.5)


def test_the_block_input_site_leaves_the_stream():
    config = small(moe={"virtual_output": "zero"})
    block = MoEBlock(config.stack, config.moe)
    params = zeroed(initial(block), "'out'", "'down'", "w_down_EFD")
    np.testing.assert_array_equal(block.apply({"params": params}, X_BTD, CONTEXT)[0], X_BTD)
