import csv
import json

import numpy as np
import pytest

from anyexperts_jax.analysis import bench_cases, bench_layer
from anyexperts_jax.analysis.bench_cases import LayerShape
from anyexperts_jax.analysis.stopwatch import Rounds, cpu_times, interleaved_rounds, others_load
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch import apply

TINY = LayerShape(tokens=24, width=8, hidden=8, experts=16, slots=3)


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_layer, "SHAPES", {"S1": TINY})
        patch.setattr(bench_layer, "has_transformers", lambda: False)
        return bench_layer.bench_layer(("S1",), ("float32",), rounds=1)


def test_every_form_part_and_budget_has_a_row(bench):
    assert {(one.run, one.form) for one in bench.layers} == {
        (run, form)
        for run in ("forward", "forward+backward")
        for form in ("blocks", "capacity 1.25", bench_layer.ONE_EXPERT)
    }
    assert all(one.milliseconds > 0 and one.ratio is None for one in bench.layers)
    assert {one.part for one in bench.parts} == {"layer", *bench_layer.PARTS, "overhead", "experts"}
    assert [one.real for one in bench.budgets if one.form == "blocks"] == list(bench_layer.BUDGETS)
    assert bench.budgets[0].ratio == 1


def test_the_implementation_asked_for_runs_in_every_table(monkeypatch):
    taken = set()
    monkeypatch.setattr(bench_layer, "BUDGETS", (2.0,))
    for module, op in ((apply, "apply_blocks"), (apply, "apply_capacity"), (bench_cases, "expert_mlp")):
        run = getattr(module, op)

        def note(*operands, run=run, op=op, **options):
            taken.add((op, options.get("implementation", operands[-1] if op == "expert_mlp" else None)))
            return run(*operands, **options)

        monkeypatch.setattr(module, op, note)
    for table in (bench_layer.time_parts, bench_layer.time_budgets):
        table("S1", TINY, "float32", 1, 0.0, "reference")
    bench_layer.compare_layers("S1", TINY, "float32", 1, 0.0, "reference", backward=False)
    capacity_drops_by_default = ("apply_capacity", None)
    assert taken - {capacity_drops_by_default} == {
        (op, "reference") for op in ("apply_blocks", "apply_capacity", "expert_mlp")
    }


def test_an_implementation_that_is_unknown_or_cannot_run_here(monkeypatch):
    with pytest.raises(UserError, match=r"^implementation='cuda' is unknown; valid: reference, xla"):
        bench_layer.bench_layer(("S1",), implementation="cuda")
    monkeypatch.setattr(bench_layer, "SHAPES", {"S1": TINY})
    with pytest.raises(UserError, match=r"^implementation='pallas_triton' needs an NVIDIA GPU and this runs on cpu"):
        bench_layer.bench_layer(("S1",), ("bfloat16",), implementation="pallas_triton")


def test_files_hold_the_command_and_the_rows(bench, tmp_path):
    paths = bench_layer.write_bench(bench, tmp_path / "results", "anyexperts bench layer")
    found = json.loads(paths[0].read_text())
    assert found["command"] == "anyexperts bench layer"
    with paths[1].open() as file:
        assert len(found["layers"]) == len(list(csv.DictReader(file))) == len(bench.layers)
    text = paths[2].read_text()
    assert "`anyexperts bench layer`" in text
    assert "| S1 float32 forward | blocks |" in text


def test_budget_plans_have_the_average_exactly_and_one_shape():
    plans = [bench_cases.budget_plan(TINY, 6, real) for real in (5.0, 3.5, 2.0)]
    assert [float(plan.real_slots_N.mean()) for plan in plans] == [5.0, 3.5, 2.0]
    for plan in plans:
        held_NK = np.asarray(plan.expert_ids_NK) < TINY.experts
        assert plan.expert_ids_NK.shape == (24, 6)
        np.testing.assert_array_equal(held_NK.sum(1), plan.real_slots_N)


def test_ratios_are_taken_within_rounds():
    """Twice as slow in two rounds of three, whatever the machine does between them: 2, where the medians give 4."""
    found = Rounds({"own": [2.0, 8.0, 20.0], "other": [1.0, 2.0, 10.0]}, None)
    assert found.ratio("own", "other") == 2.0
    assert found.milliseconds("own") == 8000.0


def test_rounds_alternate():
    order = []
    found = interleaved_rounds({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {name: len(own) for name, own in found.seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.skipif(cpu_times() is None, reason="no /proc/stat")
def test_own_work_is_not_others_load():
    start = cpu_times()
    while cpu_times().wall - start.wall < 0.3:
        pass
    pretended = start._replace(busy=start.busy - 3.0)  # as if others had worked 3 s more
    assert others_load(pretended) - others_load(start) > 2.0
    assert others_load(None) is None


def test_unknown_shape_and_dtype():
    with pytest.raises(UserError, match=r"^shape='S9' is unknown; valid: S1, S2, S3, S4$"):
        bench_layer.bench_layer(("S9",))
    with pytest.raises(UserError, match=r"^dtype='float16' is unknown; valid: float32, bfloat16$"):
        bench_layer.bench_layer(("S1",), ("float16",))
    with pytest.raises(UserError, match=r"^rounds=0 must be >= 1$"):
        bench_layer.bench_layer(("S1",), rounds=0)


@pytest.mark.parity
def test_transformers_computes_the_same_layer():
    pytest.importorskip("transformers")
    from anyexperts_jax.analysis.bench_peers import transformers_layer

    plan = bench_cases.top_k_plan(TINY)
    x_ND, weights = bench_cases.operands(TINY, "float32")
    call = transformers_layer(
        np.asarray(x_ND),
        np.asarray(plan.expert_ids_NK),
        np.asarray(plan.weights_NK),
        tuple(np.asarray(w) for w in weights),
        "float32",
        backward=False,
    )
    ours = bench_cases.layer(plan, x_ND, weights, "blocks", backward=False).call()
    np.testing.assert_allclose(call().numpy(), ours, rtol=1e-4, atol=1e-4)
