import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.ops.attention import CausalMask, attention
from anyexperts_jax.sharding import attention as split
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement

B, T, H, G, A = 4, 16, 4, 2, 8
F32 = jnp.dtype(jnp.float32)
MESHES = {"batch": MeshConfig(data=2, fsdp=2, tensor=2), "heads": MeshConfig(data=4, tensor=2)}


def operands():
    rng = np.random.default_rng(0)
    rows = tuple(jnp.asarray(rng.normal(size=(B, T, heads, A)), jnp.float32) for heads in (H, G, G))
    segment_BT = np.arange(T) // np.array([[16], [4], [6], [16]])
    return rows, CausalMask(jnp.asarray(np.arange(T) < np.array([[16], [9], [12], [1]])), jnp.asarray(segment_BT))


@pytest.mark.parametrize("name", MESHES)
def test_devices_attend_for_their_own_sequences_and_heads(name):
    rows, mask = operands()
    placement = Placement(make_mesh(MESHES[name]))
    total = lambda run: jax.grad(lambda *rows: jnp.sin(run(*rows)).sum(), (0, 1, 2))  # noqa: E731
    found = jax.jit(total(lambda *rows: split.split_attention(*rows, mask, placement)))(*rows)
    expected = total(lambda *rows: attention(*rows, mask.dense()))(*rows)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_mask_stays_whole_where_a_kernel_runs_that_sees_all_positions(monkeypatch):
    mask = operands()[1]
    assert isinstance(split.whole_mask(mask, A, F32, None), jax.Array)  # no TPU here
    monkeypatch.setattr(split, "default_implementation", lambda *sizes, causal: "splash")
    assert split.whole_mask(mask, A, F32, None) is mask  # without a placement arrays lie on one device
    with jax.sharding.use_abstract_mesh(make_mesh(MESHES["heads"]).abstract_mesh):
        assert not isinstance(split.whole_mask(mask, A, F32, None), CausalMask)
    assert split.whole_mask(mask, A, F32, Placement(make_mesh(MESHES["heads"]))) is mask
    positions = Placement(make_mesh(MeshConfig(data=4, sequence=2)))
    np.testing.assert_array_equal(split.whole_mask(mask, A, F32, positions), mask.dense())
