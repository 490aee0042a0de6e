"""The table of block sizes: its entries, its fallback, and its errors."""

import json

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import tpu_limits, tpus
from anyexperts_jax.ops.expert_mlp import tpu_size_table
from anyexperts_jax.ops.expert_mlp.tpu_size_table import load_table, parse_table, sizes_for
from anyexperts_jax.ops.expert_mlp.tpu_sizes import (
    KERNELS,
    Shape,
    block_budget,
    choose_sizes,
    kernel_bytes,
)

CHIPS = {name: tpu.limits for name, tpu in tpus().items()}
UNKNOWN_CHIP = tpu_limits(None)
SHAPES = {"A": Shape(960, 2048, 1408, 2), "B": Shape(320, 2048, 768, 2), "P": Shape(320, 2048, 512, 2)}
SIZES = {"block": 256, "slab": 256, "step": 128, "columns": None}
SMALL = {"capacity": 256, "over": 128, "width": 512, "hidden": 512, "itemsize": 2}
WHOLE = SMALL | {"forward": SIZES, "backward": SIZES, "weights": SIZES | {"columns": 512}}


def as_text(**chips):
    return json.dumps({"chips": chips})


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_studied_shapes_are_in_the_table_and_cut_to_the_capacity(chip, shape):
    (entry,) = [e for e in load_table()[chip] if e.covers(SHAPES[shape])]
    found = sizes_for(CHIPS[chip], SHAPES[shape])
    assert [getattr(found, kernel) for kernel in KERNELS] == [getattr(entry, kernel) for kernel in KERNELS]
    assert (found.cores, found.vmem_bytes) == (CHIPS[chip].cores, CHIPS[chip].vmem_limit)
    fewer_rows = SHAPES[shape]._replace(capacity=SHAPES[shape].capacity * 6 // 10)
    cut = sizes_for(CHIPS[chip], fewer_rows)
    assert all(getattr(cut, k).block < fewer_rows.capacity + getattr(cut, k).step for k in KERNELS)
    assert all(getattr(cut, k).step == getattr(entry, k).step for k in KERNELS)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_entry_fits_in_vmem(chip):
    for entry in load_table()[chip]:
        for kernel in KERNELS:
            assert kernel_bytes(kernel, entry.shape, getattr(entry, kernel)) <= block_budget(CHIPS[chip])


@pytest.mark.parametrize("shape", [Shape(961, 2048, 1408, 2), Shape(960, 1024, 1408, 4), Shape(64, 256, 128, 2)])
def test_a_shape_that_is_not_in_the_table_gets_what_the_heuristic_says(shape):
    for chip in (*CHIPS.values(), UNKNOWN_CHIP):
        assert sizes_for(chip, shape) == choose_sizes(chip, shape)


def test_an_unknown_chip_gets_what_the_heuristic_says():
    assert sizes_for(UNKNOWN_CHIP, SHAPES["A"]) == choose_sizes(UNKNOWN_CHIP, SHAPES["A"])


def test_another_table_can_be_given():
    table = parse_table(as_text(v5e=[WHOLE]))
    assert sizes_for(CHIPS["v5e"], Shape(200, 512, 512, 2), table).forward.block == 256
    assert sizes_for(CHIPS["v5e"], SHAPES["A"], table) == choose_sizes(CHIPS["v5e"], SHAPES["A"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"holds no table \(JSONDecodeError: .*\)"),
        ("[]", r"holds no table \(TypeError: .*\)"),
        ("{}", r"holds no table \(KeyError: 'chips'\)"),
        (as_text(v9=[WHOLE]), r"chip='v9' is unknown; valid: v5e, v5p, v6e, tpu7x"),
        (as_text(v5e=[SMALL]), r"an entry of v5e is broken \('forward'\): .*"),
        (as_text(v5e=[3]), r"an entry of v5e is broken \(.*\): 3"),
        (as_text(v5e=[WHOLE | {"colour": 1}]), r"an entry of v5e is broken \(.*colour.*\): .*"),
        (as_text(v5e=[WHOLE | {"forward": SIZES | {"step": 96}}]), r"an entry of v5e is broken \(block=256 .*\): .*"),
        (
            as_text(v5e=[WHOLE | {"width": 2**16}]),
            r"forward takes \d+, backward takes \d+, .* bytes of VMEM at Shape\(.*\) on v5e, more than \d+",
        ),
    ],
)
def test_a_broken_table_is_named_in_one_line(text, says):
    with pytest.raises(UserError, match=rf"^tpu_sizes\.json:? {says}; write it anew with `python -m \S+`$") as caught:
        parse_table(text)
    assert "\n" not in str(caught.value)


def test_the_table_says_where_it_comes_from():
    text = (tpu_size_table.importlib.resources.files(tpu_size_table.__package__) / tpu_size_table.FILE).read_text()
    provenance = json.loads(text)["provenance"]
    assert provenance["note"] == "static, no device run"
    assert {"tool", "command", "versions", "date"} <= set(provenance)
