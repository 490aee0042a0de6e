from types import SimpleNamespace

import jax
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import (
    MESH_AXES,
    MeshConfig,
    make_mesh,
    split_into_slices,
)


def in_slices(numbers):
    return [SimpleNamespace(platform="tpu", id=i, slice_index=number) for i, number in enumerate(numbers)]


def test_minus_one_takes_the_devices_left_over():
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}
    assert MeshConfig(data=2, expert=-1, tensor=2).sizes(8)["expert"] == 2


def test_mesh_has_every_axis_and_every_device_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1, "sequence": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    assert make_mesh(MeshConfig(), jax.devices()[:3]).shape["data"] == 3


def test_slices_repeat_the_mesh_of_one():
    mesh = make_mesh(MeshConfig(data=2, expert=-1, dcn_data=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "expert": 2, "tensor": 1, "sequence": 1}
    first, second = mesh.devices[:2].flatten(), mesh.devices[2:].flatten()  # data's outer half is the slice
    assert {device.id for device in first} == {0, 1, 2, 3}
    assert {device.id for device in second} == {4, 5, 6, 7}
    both = make_mesh(MeshConfig(data=1, fsdp=2, dcn_data=2, dcn_fsdp=2))
    assert dict(both.shape) == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1, "sequence": 1}
    ids = [[device.id // 2 for device in row] for row in both.devices.reshape(2, 4)]
    assert ids == [[0, 0, 1, 1], [2, 2, 3, 3]]  # slices in turn, those of one fsdp group next to each other


def test_devices_are_grouped_by_the_slice_they_name():
    parts = split_into_slices(in_slices([1, 0, 1, 0]), 2)
    assert [[device.id for device in part] for part in parts] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(data=0), r"mesh\.data=0 must be >= 1, or -1"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "mesh axes data, fsdp are all -1"),
        (lambda: MeshConfig(dcn_data=-1), r"mesh\.dcn_data=-1 must be >= 1$"),
        (lambda: MeshConfig(dcn_fsdp=3).sizes(8), "data=-1 x dcn_fsdp=3: 3 does not divide 8 devices"),
        (lambda: MeshConfig(data=2, dcn_data=2).sizes(8), "data=2 x dcn_data=2 needs 4 devices, there are 8"),
        (lambda: split_into_slices(in_slices([0, 0, 1, 1]), 4), "= 4, but the 4 devices are in 2 slices of 2"),
        (lambda: split_into_slices(in_slices([0, 1, 1, 1]), 2), "= 2, but the 4 devices are in 2 slices of 1, 3"),
        (lambda: MeshConfig(data=-1, fsdp=3).sizes(8), "data=-1 x fsdp=3: 3 does not divide 8 devices"),
        (lambda: MeshConfig(data=2, fsdp=2).sizes(8), "data=2 x fsdp=2 needs 4 devices, there are 8"),
        (lambda: MeshConfig(data=1).sizes(8), "all axes 1 needs 1 devices, there are 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
