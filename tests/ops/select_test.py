import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec

from anyexperts_jax.ops._select import default_implementation, sees_one_device

KINDS = {
    "tpu": ("TPU v5e", "pallas_tpu"),
    "gpu": ("NVIDIA H100 80GB HBM3", "pallas_triton"),
    "rocm": ("AMD Instinct MI300X", "xla"),
}


def mesh_of(platform, devices):
    kind, _ = KINDS[platform]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu" if platform == "rocm" else platform)
    return AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize("platform", KINDS)
def test_the_devices_kernels_if_they_support_the_dtype(platform):
    with jax.sharding.use_abstract_mesh(mesh_of(platform, 1)):
        for dtype in (jnp.bfloat16, jnp.float32):
            assert default_implementation(jnp.dtype(dtype)) == KINDS[platform][1]
        assert default_implementation(jnp.dtype(jnp.float64)) == "xla"


@pytest.mark.parametrize("platform", KINDS)
def test_xla_if_the_op_is_split_over_several_devices(platform):
    with jax.sharding.use_abstract_mesh(mesh_of(platform, 8)):
        assert default_implementation(jnp.dtype(jnp.bfloat16)) == "xla"


def test_a_shard_of_a_mesh_is_one_device():
    found = []

    def shard(x):
        found.append(sees_one_device())
        return x

    mesh = Mesh(np.array(jax.devices()), ("data",))
    jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")))(
        np.ones(8)
    )
    assert found
    assert all(found)
    assert sees_one_device()  # no mesh in use: splitting arrays needs a mesh in use or a Placement
    with jax.sharding.use_abstract_mesh(mesh_of("tpu", 8)):
        assert not sees_one_device()
