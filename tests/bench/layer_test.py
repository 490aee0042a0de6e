import csv
import json
import time

import chex
import numpy as np
import pytest

from anyexperts_jax.bench import cases, layer
from anyexperts_jax.bench.layer import Timing
from anyexperts_jax.bench.stopwatch import Rounds, cpu_times, interleaved_rounds, others_load
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.shapes import LayerShape
from anyexperts_jax.dispatch import apply

TINY = LayerShape(tokens=24, width=8, hidden=8, experts=16, slots=3)


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "SHAPES", {"S1": TINY})
        patch.setattr(layer, "has_transformers", lambda: False)
        patch.setattr(layer, "BUDGETS", (8.0, 4.8))  # each further budget compiles two more programs
        return layer.bench_layer(("S1",), ("float32",), Timing(rounds=1))


@pytest.mark.slow
def test_every_form_part_and_budget_has_a_row(bench):
    assert {(one.run, one.form) for one in bench.layers} == {
        (run, form) for run in ("forward", "forward+backward") for form in ("blocks", "capacity 1.25", layer.ONE_EXPERT)
    }
    assert all(one.milliseconds > 0 and one.ratio is None for one in bench.layers)
    assert {one.part for one in bench.parts} == {"layer", *layer.PARTS, "overhead", "experts"}
    for run in ("forward", "forward+backward"):
        found = [one.real for one in bench.budgets if one.form == "blocks" and one.run == run]
        assert found == [8.0, 4.8]
    assert bench.budgets[0].ratio == 1


def test_the_sweep_goes_from_eight_real_experts_to_half_of_them():
    """In steps of a tenth; the first is the reference of the others."""
    assert layer.BUDGETS == (8.0, 7.2, 6.4, 5.6, 4.8, 4.0)


@pytest.mark.slow
def test_the_implementation_asked_for_runs_in_every_table(monkeypatch):
    taken = set()
    monkeypatch.setattr(layer, "BUDGETS", (2.0,))
    asked, expert_op = apply.resolve_implementation, cases.expert_mlp

    def note_layer(execution, *where):
        taken.add((execution.dispatch, execution.implementation))
        return asked(execution, *where)

    def note_op(*operands, **options):
        taken.add(("expert_mlp", operands[-1]))
        return expert_op(*operands, **options)

    monkeypatch.setattr(apply, "resolve_implementation", note_layer)
    monkeypatch.setattr(cases, "expert_mlp", note_op)
    once = Timing(rounds=1)
    layer.time_parts("S1", TINY, "float32", once, "reference")
    layer.time_budgets("S1", TINY, "float32", once, "reference", backward=False)
    monkeypatch.setattr(layer, "has_transformers", lambda: False)
    rows = layer.compare_layers("S1", TINY, "float32", once, ("reference", "xla"), backward=False)
    assert [one.form for one in rows] == [
        "blocks, reference",
        "capacity 1.25, reference",
        "blocks, xla",
        "capacity 1.25, xla",
        layer.ONE_EXPERT,
    ]
    capacity_drops_by_default = ("capacity", None)
    assert taken - {capacity_drops_by_default} == {(op, "reference") for op in ("blocks", "capacity", "expert_mlp")} | {
        ("blocks", "xla"),
        ("capacity", "xla"),
    }


def test_an_unknown_or_unavailable_implementation_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"^implementation='cuda' is unknown; valid: reference, xla"):
        layer.bench_layer(("S1",), implementations=["cuda"])
    monkeypatch.setattr(layer, "SHAPES", {"S1": TINY})
    with pytest.raises(UserError, match=r"^implementation='pallas_triton' needs an NVIDIA GPU and this runs on cpu"):
        layer.bench_layer(("S1",), ("bfloat16",), implementations=["pallas_triton"])


@pytest.mark.slow
def test_files_hold_the_command_and_the_rows(bench, tmp_path):
    paths = layer.write_bench(bench, tmp_path / "results", "anyexperts bench layer")
    found = json.loads(paths[0].read_text())
    assert found["command"] == "anyexperts bench layer"
    with paths[1].open() as file:
        assert len(found["layers"]) == len(list(csv.DictReader(file))) == len(bench.layers)
    text = paths[2].read_text()
    assert "`anyexperts bench layer`" in text
    assert "| S1 float32 forward | blocks |" in text


def test_budget_plans_have_the_average_exactly_and_one_shape():
    plans = [cases.budget_plan(TINY, 6, real) for real in (5.0, 3.5, 2.0)]
    assert [float(plan.real_slots_N.mean()) for plan in plans] == [5.0, 3.5, 2.0]
    for plan in plans:
        held_NK = np.asarray(plan.expert_ids_NK) < TINY.experts
        assert plan.expert_ids_NK.shape == (24, 6)
        np.testing.assert_array_equal(held_NK.sum(1), plan.real_slots_N)


def test_ratios_are_taken_within_rounds():
    """One is twice as slow in two of three rounds while the machine slows down: 2, though the medians differ by 4."""
    found = Rounds({"own": [2.0, 8.0, 20.0], "other": [1.0, 2.0, 10.0]}, None)
    assert found.ratio("own", "other") == 2.0
    assert found.milliseconds("own") == 8000.0


def test_consecutive_calls_share_their_time():
    calls = []
    found = interleaved_rounds({"a": lambda: calls.append(time.sleep(0.02))}, rounds=1, repeats=5)
    assert len(calls) == 1 + 1 + 5, "one call warms up, one begins the turn"
    assert 0.02 <= found.seconds["a"][0] < 0.1


@pytest.mark.slow
def test_ragged_dot_computes_the_same_layer():
    plan = cases.top_k_plan(TINY)
    operands = cases.operands(TINY, "float32")
    for backward in (False, True):
        own = cases.layer(plan, *operands, "blocks", backward=backward).call()
        ragged = cases.ragged_layer(plan, *operands, backward=backward).call()
        chex.assert_trees_all_close(own, ragged, rtol=1e-4, atol=1e-4)


def test_rounds_alternate():
    order = []
    found = interleaved_rounds({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 2, "the second of each two calls in a turn is timed"
    assert {name: len(own) for name, own in found.seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.skipif(cpu_times() is None, reason="no /proc/stat")
def test_our_own_work_does_not_count_as_load():
    start = cpu_times()
    while cpu_times().wall - start.wall < 0.3:
        pass
    pretended = start._replace(busy=start.busy - 3.0)  # as if others had worked 3 s more
    assert others_load(pretended) - others_load(start) > 2.0
    assert others_load(None) is None


def test_an_unknown_shape_or_dtype_is_refused():
    with pytest.raises(UserError, match=r"^shape='S9' is unknown; valid: S1, S2, S3, S4, A, B, P, P4$"):
        layer.bench_layer(("S9",))
    with pytest.raises(UserError, match=r"^dtype='float16' is unknown; valid: float32, bfloat16$"):
        layer.bench_layer(("S1",), ("float16",))
    with pytest.raises(UserError, match=r"^rounds=0 must be >= 1$"):
        layer.bench_layer(("S1",), timing=Timing(rounds=0))
    with pytest.raises(UserError, match=r"^repeats=0 must be >= 1$"):
        layer.bench_layer(("S1",), timing=Timing(repeats=0))


@pytest.mark.parity
def test_transformers_computes_the_same_layer():
    pytest.importorskip("transformers")
    from anyexperts_jax.bench.peers import transformers_layer

    plan = cases.top_k_plan(TINY)
    x_ND, weights = cases.operands(TINY, "float32")
    call = transformers_layer(x_ND, plan.expert_ids_NK, plan.weights_NK, weights, backward=False)
    ours = cases.layer(plan, x_ND, weights, "blocks", backward=False).call()
    np.testing.assert_allclose(call().tensor.numpy(), ours, rtol=1e-4, atol=1e-4)
