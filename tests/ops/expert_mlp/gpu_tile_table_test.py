"""The table of GPU tiles: its entries, its fallback, and its errors."""

import dataclasses
import importlib.resources
import json

import jax.numpy as jnp
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import gpu_limits, gpus
from anyexperts_jax.ops.expert_mlp import gpu_tile_table
from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions
from anyexperts_jax.ops.expert_mlp.gpu_tile_table import load_table, parse_table, tiles_for
from anyexperts_jax.ops.expert_mlp.gpu_tiles import GpuShape, Tiles, TritonTile, choose_tiles
from anyexperts_jax.ops.expert_mlp.vjp_gpu import triton_options

SHAPES = {"A": (2048, 1408), "B": (2048, 768), "P": (2048, 512)}
KINDS = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}
P = GpuShape(2048, 512, 2)
H100 = gpus()["h100"].limits
TILE = {"m": 128, "n": 64, "k": 32, "warps": 8, "stages": 4}
WHOLE = {
    "implementation": "pallas_triton",
    "itemsize": 2,
    "narrowest": 256,
    "multiple": 8,
    "source": "a test",
    "tiles": dict.fromkeys(Tiles._fields, TILE),
}


def as_text(**gpus):
    return json.dumps({"gpus": gpus})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gpu", KINDS)
def test_the_studied_shapes_are_in_the_table(gpu, itemsize, shape):
    shape = GpuShape(*shape, itemsize)
    (entry,) = [e for e in load_table()[gpu] if e.covers("pallas_triton", shape)]
    assert tiles_for("pallas_triton", KINDS[gpu], shape) == entry.tiles


def test_the_h100_has_the_tiles_that_were_fastest_on_it():
    """The rows of experiments/results/h100/tiles.md that its last paragraph names."""
    tiles = tiles_for("pallas_triton", KINDS["H100"], P)
    assert tiles.gate_up == tiles.d_w_gate_up == TritonTile(m=128, n=128, k=64, warps=8, stages=4)
    assert tiles.down == TritonTile(m=128, n=256, k=64, warps=8, stages=3)
    assert tiles.d_w_down == TritonTile(m=128, n=128, k=64, warps=8, stages=5)
    (entry,) = [e for e in load_table()["H100"] if e.covers("pallas_triton", P)]
    assert entry.source == "device: experiments/results/h100/tiles.md"
    assert all(e.source == "static" for entries in load_table().values() for e in entries if e != entry)


@pytest.mark.parametrize("shape", [GpuShape(2048, 508, 2), GpuShape(2048, 1412, 2), GpuShape(256, 512, 2)])
def test_a_shape_that_is_not_in_the_table_gets_what_the_heuristic_says(shape):
    for kind in KINDS.values():
        assert tiles_for("pallas_triton", kind, shape) == choose_tiles("pallas_triton", gpu_limits(kind), shape)


def test_an_unknown_gpu_gets_what_the_heuristic_says():
    assert tiles_for("pallas_triton", "NVIDIA B200", P) == choose_tiles("pallas_triton", gpu_limits(None), P)
    assert tiles_for("pallas_triton", None, P) == choose_tiles("pallas_triton", gpu_limits(None), P)


def test_another_table_can_be_given():
    table = parse_table(as_text(A100=[WHOLE]))
    tile = TritonTile(**TILE)
    assert tiles_for("pallas_triton", KINDS["A100"], GpuShape(256, 264, 2), table) == Tiles(*(tile,) * 6)
    assert tiles_for("pallas_triton", KINDS["H100"], P, table) == choose_tiles(
        "pallas_triton", gpu_limits(KINDS["H100"]), P
    )


def test_options_take_the_tiles_of_the_shape_and_keep_those_that_are_given():
    interpreted = GpuOptions(interpret=True)
    found = triton_options(jnp.zeros((2, 2048, 512), jnp.bfloat16), interpreted)
    assert found.tiles == tiles_for("pallas_triton", None, P)
    given = dataclasses.replace(interpreted, tiles=Tiles(*(TritonTile(**TILE),) * 6))
    assert triton_options(jnp.zeros((2, 2048, 512), jnp.bfloat16), given) == given


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"holds no table \(JSONDecodeError: .*\)"),
        ("[]", r"holds no table \(TypeError: .*\)"),
        ("{}", r"holds no table \(KeyError: 'gpus'\)"),
        (as_text(H9=[WHOLE]), r"gpu='H9' is unknown; valid: H100, A100"),
        (as_text(H100=[3]), r"an entry of H100 is broken \(.*\): 3"),
        (as_text(H100=[WHOLE | {"implementation": "cuda"}]), r"an entry of H100 is broken \('cuda'\): .*"),
        (as_text(H100=[WHOLE | {"implementation": "pallas_gpu"}]), r"an entry of H100 is broken \(.*warps.*\): .*"),
        (as_text(H100=[WHOLE | {"tiles": {"down": TILE}}]), r"an entry of H100 is broken \(.*gate_up.*\): .*"),
        (as_text(H100=[WHOLE | {"colour": 1}]), r"an entry of H100 is broken \(.*colour.*\): .*"),
        (
            as_text(H100=[WHOLE | {"tiles": WHOLE["tiles"] | {"d_x": TILE | {"n": 65}}}]),
            r"an entry of H100 is broken \(m=128, n=65 .*\): .*",
        ),
        (
            as_text(A100=[WHOLE | {"tiles": WHOLE["tiles"] | {"d_x": TILE | {"stages": 9}}}]),
            r"d_x takes 221184 bytes of shared memory on A100, more than 166912",
        ),
    ],
)
def test_a_broken_table_is_named_in_one_line(text, says):
    with pytest.raises(UserError, match=rf"^gpu_tiles\.json:? {says}; write it anew with `python -m \S+`$") as caught:
        parse_table(text)
    assert "\n" not in str(caught.value)


def test_the_table_says_where_it_comes_from():
    text = (importlib.resources.files(gpu_tile_table.__package__) / gpu_tile_table.FILE).read_text()
    provenance = json.loads(text)["provenance"]
    assert {"note", "tool", "command", "versions", "date", "at", "tried"} <= set(provenance)
    capabilities = {name: one["compute capability"] for name, one in provenance["compiled for"].items()}
    assert capabilities == {gpu.limits.name: gpu.capability for gpu in gpus().values()}
