import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement, is_split, one_device, placement_of


def test_arrays_are_where_their_shardings_say():
    device = jax.devices()[3]
    assert placement_of({"a": jax.device_put(np.ones(8), device)}) == one_device(device)
    assert placement_of({"a": np.ones(8)}) == one_device()
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    split = jax.device_put(np.ones(8), NamedSharding(mesh, PartitionSpec("expert")))
    assert placement_of([split, np.ones(2)]) == Placement(mesh)


def test_a_mesh_of_one_device_splits_nothing():
    assert not is_split(None)
    assert not is_split(one_device())
    assert is_split(Placement(make_mesh(MeshConfig())))


def test_arrays_on_several_devices_need_one_mesh():
    apart = [jax.device_put(np.ones(2), device) for device in jax.devices()[:2]]
    with pytest.raises(UserError, match="the parameters lie on 2 devices, but on no mesh of make_mesh"):
        placement_of(apart)
    meshes = (make_mesh(MeshConfig()), make_mesh(MeshConfig(data=1, expert=8)))
    with pytest.raises(UserError, match="the parameters lie on different meshes; put all on one"):
        placement_of([jax.device_put(np.ones(8), NamedSharding(mesh, PartitionSpec())) for mesh in meshes])
