"""Times computed by hand on small slices; W is the bandwidth of a link in bytes/s."""

import dataclasses
from types import SimpleNamespace

import pytest

from anyexperts_jax.aot.collectives import Collective
from anyexperts_jax.aot.network import network_seconds
from anyexperts_jax.core.hardware import chip

CHIP = dataclasses.replace(chip("v5p"), link_gbs=1.0, wraps_at=8, dcn_gbs=0.5)
SIZE = 800  # bytes on each device
W = 1e9


def line(length):
    return [SimpleNamespace(coords=[x, 0, 0], process_index=0) for x in range(length)]


def seconds(kind, axes, devices, mesh, chip=CHIP):
    return network_seconds([Collective(kind, axes, 1, SIZE)], devices, mesh, chip)


@pytest.mark.parametrize(
    ("kind", "length", "bytes_over_a_link"),
    [
        ("all-gather", 8, SIZE * 7 / 8 / 2),  # a ring: what a device lacks comes over its two links
        ("reduce-scatter", 8, SIZE * 7 / 8 / 2),
        ("all-reduce", 8, 2 * SIZE * 7 / 8 / 2),  # scattered, then gathered
        ("all-to-all", 8, 8 * SIZE / 8),  # half of the ring sends half of what it has over two links
        ("all-gather", 4, SIZE * 3 / 4),  # too short for a ring: the first device has one link
        ("all-to-all", 4, 4 * SIZE / 4),
        ("collective-permute", 4, 0),
    ],
)
def test_times_of_one_axis_along_a_line(kind, length, bytes_over_a_link):
    (alone,), together, between = seconds(kind, ("expert",), line(length), {"fsdp": 1, "expert": length})
    assert alone == pytest.approx(bytes_over_a_link / W)
    assert together == alone
    assert between == 0


def test_groups_that_share_links_wait_for_each_other():
    """Pairs two apart on a line of four: both pairs' halves cross the middle."""
    (alone,), _, _ = seconds("all-to-all", ("fsdp",), line(4), {"fsdp": 2, "expert": 2})
    assert alone == pytest.approx(2 * SIZE / 2 / W)
    (alone,), _, _ = seconds("all-to-all", ("expert",), line(4), {"fsdp": 2, "expert": 2})
    assert alone == pytest.approx(SIZE / 2 / W)


def test_times_on_separate_links_do_not_add_up():
    devices = [SimpleNamespace(coords=[x, y, 0], process_index=0) for x in range(2) for y in range(2)]
    rows = [Collective("all-gather", (axis,), 1, SIZE) for axis in ("fsdp", "expert", "fsdp")]
    alone, together, _ = network_seconds(rows, devices, {"fsdp": 2, "expert": 2}, CHIP)
    assert alone == pytest.approx([SIZE / 2 / W] * 3)
    assert together == pytest.approx(2 * SIZE / 2 / W)  # the two of fsdp, one after the other


def test_a_gather_over_the_whole_torus_goes_over_all_links_of_a_chip():
    devices = [SimpleNamespace(coords=[x, y, 0], process_index=0) for x in range(2) for y in range(2)]
    (alone,), _, _ = seconds("all-gather", ("fsdp", "expert"), devices, {"fsdp": 2, "expert": 2})
    assert alone == pytest.approx(3 / 4 * SIZE / (2 * W))


def test_two_devices_of_a_chip_share_its_links():
    devices = [SimpleNamespace(coords=[x, 0, 0], process_index=0) for x in (0, 0, 1, 1)]
    (alone,), _, _ = seconds("all-to-all", ("expert",), devices, {"fsdp": 1, "expert": 4})
    assert alone == pytest.approx(2 * 2 * SIZE / 4 / W)  # two devices to two


def test_between_slices_the_data_centre_network_is_used():
    _, inside, between = seconds("all-reduce", ("dcn",), line(4), {"fsdp": 4})
    assert inside == 0
    assert between == pytest.approx(2 * SIZE / 0.5e9)


def test_a_node_of_gpus_shares_its_adapters_and_a_gpu_its_switch():
    gpu = dataclasses.replace(chip("h100"), link_gbs=4.0, dcn_gbs=0.5)
    nodes = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    (inside,), _, _ = seconds("all-to-all", ("expert",), nodes, {"fsdp": 2, "expert": 4}, gpu)
    assert inside == pytest.approx(3 / 4 * SIZE / 4e9)
    (across,), _, _ = seconds("all-to-all", ("expert",), nodes, {"fsdp": 1, "expert": 8}, gpu)
    assert across == pytest.approx(4 * 4 * SIZE / 8 / (4 * 0.5e9))
