import dataclasses

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import gpu_limits, gpus
from anyexperts_jax.ops.expert_mlp.gpu_tiles import (
    GpuShape,
    MosaicTile,
    Tiles,
    TritonTile,
    choose_tiles,
    shared_bytes,
)

H100 = gpus()["h100"].limits
SHAPES = [GpuShape(*sizes) for sizes in ((2048, 512, 2), (1001, 515, 4), (72, 48, 2), (1, 1, 4), (7168, 2048, 2))]
GOOD = TritonTile(m=128, n=64, k=32, warps=8, stages=4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", [*(gpu.limits for gpu in gpus().values()), gpu_limits(None)])
def test_every_shape_has_tiles_that_fit_in_every_gpu(gpu, shape):
    for kernel, tile in choose_tiles("pallas_triton", gpu, shape)._asdict().items():
        assert shared_bytes(kernel, tile, shape.itemsize) <= (gpu.shared_bytes if gpu.wgmma else 99 * 1024)
        assert (tile.m, tile.warps) == (128, 8)
        columns = shape.width if kernel in ("down", "d_x", "d_w_down") else shape.hidden
        assert tile.n < 2 * max(columns, 16)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.itemsize == 2])
def test_mosaic_tiles_fit_in_a_hopper_with_what_their_last_step_reads(shape):
    tiles = choose_tiles("pallas_gpu", H100, shape)
    for kernel, tile in tiles._asdict().items():
        assert tile.n == (64 if (shape.hidden if "up" in kernel else shape.width) <= 64 else 128)
        step = shared_bytes(kernel, dataclasses.replace(tile, stages=tile.stages + 1), 2)
        assert shared_bytes(kernel, tile, 2) <= H100.shared_bytes
        assert step > H100.shared_bytes or tile.stages == 5


def test_shared_memory_is_that_of_the_compiler():
    """Figures of experiments/results/kernels_gpu.json."""
    assert shared_bytes("d_x", TritonTile(m=128, n=128, k=64, warps=8, stages=3), 2) == 192 * 1024
    assert shared_bytes("down", TritonTile(m=128, n=256, k=64, warps=8, stages=3), 2) == 144 * 1024
    assert 0 <= shared_bytes("d_gate_up", MosaicTile(m=128, n=128, k=64, stages=4), 2) - 224.1 * 1024 < 1024


@pytest.mark.parametrize(
    ("tile", "changed", "says"),
    [
        (GOOD, {"n": 96}, r"m=128, n=96 and k=32 must be powers of two, 16 or more"),
        (GOOD, {"k": 8}, r"m=128, n=64 and k=8 must be powers of two, 16 or more"),
        (GOOD, {"warps": 3}, r"warps=3 must be a power of two"),
        (GOOD, {"stages": 0}, r"stages=0 must be >= 1"),
        (MosaicTile(128, 64, 64, 1), {"m": 64}, r"m=64 must be a multiple of 128, n=64 and k=64 of 64"),
        (MosaicTile(128, 64, 64, 1), {"k": 96}, r"m=128 must be a multiple of 128, n=64 and k=96 of 64"),
        (MosaicTile(128, 64, 64, 1), {"stages": 0}, r"stages=0 must be >= 1"),
    ],
)
def test_an_invalid_tile_is_refused(tile, changed, says):
    with pytest.raises(UserError, match=f"^{says}$"):
        dataclasses.replace(tile, **changed)


def test_the_kernels_have_a_tile_each():
    assert len(choose_tiles("pallas_gpu", H100, SHAPES[0])) == len(Tiles._fields) == 6
