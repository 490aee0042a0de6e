"""The static time model, and the files that hold its figures. These tests run everywhere and need no compiler."""

import json
import pathlib

import numpy as np
import pytest

from anyexperts_jax.aot import kernels
from anyexperts_jax.core.hardware import tpus
from experiments.bench import tpu_model, tpu_peers, tpu_table
from experiments.bench.tpu_model import Steps

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULT = json.loads((ROOT / "experiments" / "results" / "kernels_tpu.json").read_text())
GOLDEN = json.loads((ROOT / "tests" / "golden" / "tpu_kernels.json").read_text())
OURS = [place for place in RESULT["programs"] if "/ours/" in place]
AGAIN = "python -m experiments.bench.kernels writes the files anew"


def steps(cycles, read, written, **more):
    return Steps(np.array(cycles), np.array(read), np.array(written), **more)


def test_a_step_takes_the_longer_of_its_cycles_and_its_overlapping_copies():
    """v5e: 1500 cycles are a microsecond, as are 819000 bytes."""
    million = 819_000
    assert tpu_model.time_us(steps([1500], [million], [million]), "v5e") == pytest.approx(3)
    assert tpu_model.time_us(steps([1500] * 3, [million, 0, 0], [0, 0, 0]), "v5e") == pytest.approx(4)
    assert tpu_model.time_us(steps([1500] * 3, [million] * 3, [0] * 3), "v5e") == pytest.approx(4)
    assert tpu_model.time_us(steps([1500] * 3, [2 * million] * 3, [0] * 3), "v5e") == pytest.approx(7)
    assert tpu_model.time_us(steps([1500] * 3, [0] * 3, [2 * million] * 3), "v5e") == pytest.approx(7)
    shared = steps([0, 0], [million, million], [0, 0], cores=2)
    assert tpu_model.time_us(shared, "v5e") == pytest.approx(4)


def test_a_fetch_two_steps_ahead_hides_more_than_one_step_ahead():
    million = 819_000
    late = steps([1500] * 4, [0, 0, 0, 2 * million], [0] * 4)
    assert tpu_model.time_us(late, "v5e") == pytest.approx(5)
    assert tpu_model.time_us(late._replace(ahead=2), "v5e") == pytest.approx(4)


def test_drawn_rows_sum_to_the_shapes_rows_minus_overflow():
    shape = kernels.SHAPES["P"]
    counts = tpu_model.draw_counts(shape)
    assert counts.max() <= shape.capacity
    assert 0.9 * shape.rows < counts.sum() <= shape.rows


def test_experts_without_rows_cost_no_matmul():
    shape, found = kernels.SHAPES["P"], RESULT["programs"]["v5e/P/ours/forward"]["found"]
    hot = np.zeros(shape.experts, int)
    hot[3] = shape.capacity
    sizes = tpu_table.sizes_for("v5e", shape)
    times = [
        tpu_model.longest_us(tpu_model.our_steps("forward", "v5e", shape, sizes, found, counts), "v5e")
        for counts in (hot, np.full(shape.experts, shape.capacity))
    ]
    assert times[0] < 0.5 * times[1]


def test_peers_move_every_row_and_every_expert_once_a_turn():
    matmul = tpu_peers.Matmul("gmm", 256, 512)
    counts = np.array([300, 0, 20, 704])
    one = {"cycles": 100, "occupancy": 1.0}
    summary = {"name": "gmm_v2-tm_256-tk_256-tn_512", "passes": [one, one], "step_cycles": 1, "skipped_cycles": 1}
    (found,) = tpu_peers.steps("tokamax", "v5e", matmul, summary, counts)
    weights = 3 * 256 * 512 * tpu_model.ITEMSIZE
    rows = (found.read.sum() - weights) / (256 * tpu_model.ITEMSIZE)
    assert counts.sum() <= rows <= counts.sum() + 3 * 16
    assert set(found.cycles) == {102}
    (found,) = tpu_peers.steps("megablox", "v5e", matmul, summary, counts)
    assert found.read.sum() == weights + 4 * 256 * 256 * tpu_model.ITEMSIZE
    (found,) = tpu_peers.steps("megablox", "v5p", matmul._replace(n=1024), summary, counts)
    assert found.cores == 2


@pytest.mark.parametrize("place", OURS)
def test_every_listed_kernel_fits_in_vmem(place):
    chip, shape, _, call = place.split("/")
    found = RESULT["programs"][place]["found"]
    assert 0 < found["vmem_bytes"] <= tpus()[chip].limits.vmem_bytes, AGAIN
    golden = GOLDEN["kernels"][chip][shape][call]
    assert golden["vmem_bytes"] == found["vmem_bytes"], f"golden and result file differ: {AGAIN}"
    assert golden["occupancy"] == found["passes"][-1]["occupancy"], f"golden and result file differ: {AGAIN}"


def test_the_files_hold_every_kernel_at_the_sizes_in_use():
    for chip in tpus():
        for name, shape in kernels.SHAPES.items():
            assert set(GOLDEN["kernels"][chip][name]) == set(tpu_model.OURS)
            for call in tpu_model.OURS:
                key = RESULT["programs"][f"{chip}/{name}/ours/{call}"]["key"]
                own = tpu_model.own_sizes(call, tpu_table.sizes_for(chip, shape))
                assert key["sizes"] == vars(own), f"{chip}/{name}/{call} was compiled with other sizes: {AGAIN}"


def test_no_time_is_below_its_floor_and_fewer_rows_take_less():
    floors = {}
    for row in RESULT["rows"]:
        if row["who"] == "floor":
            floors[row["chip"], row["shape"], row["part"]] = row
        elif "ratio" in row:
            floor = floors[row["chip"], row["shape"], row["part"]]
            assert all(row[f"ns_{budget}"] >= floor[f"ns_{budget}"] for budget in tpu_table.BUDGETS), row
            assert 0.55 < row["ratio"] < 1, row


def test_the_floors_follow_from_the_table_of_chips():
    for row in RESULT["rows"]:
        if row["who"] == "floor":
            assert tpu_table._floor(row["chip"], row["shape"], row["part"]) == [row], AGAIN


def test_the_files_say_that_they_are_static():
    for kept in (RESULT, GOLDEN):
        assert kept["note"] == "static, no device run"
        assert kept["command"] == "python -m experiments.bench.kernels"
        assert {"jax", "libtpu"} <= set(kept["versions"])
    assert tpu_table.markdown(RESULT) == (ROOT / "experiments" / "results" / "kernels_tpu.md").read_text(), AGAIN
