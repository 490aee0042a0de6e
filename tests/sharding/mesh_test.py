import jax
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh


def test_minus_one_takes_the_devices_left_over():
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}
    assert MeshConfig(data=2, expert=-1, tensor=2).sizes(8)["expert"] == 2


def test_mesh_has_every_axis_and_every_device_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1, "sequence": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    assert make_mesh(MeshConfig(), jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(data=0), r"mesh\.data=0 must be >= 1, or -1"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "mesh axes data, fsdp are all -1"),
        (lambda: MeshConfig(data=-1, fsdp=3).sizes(8), "data=-1 x fsdp=3: 3 does not divide 8 devices"),
        (lambda: MeshConfig(data=2, fsdp=2).sizes(8), "data=2 x fsdp=2 needs 4 devices, there are 8"),
        (lambda: MeshConfig(data=1).sizes(8), "all axes 1 needs 1 devices, there are 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
