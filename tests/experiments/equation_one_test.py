"""The two findings on EvoMoE's equation (1), on the problem of the committed result."""

import json

import numpy as np
import pytest

from experiments.evolution.equation_one import CASES, MARKS, RESULTS, run, table

STEPS = 600


def last_distance(case):
    return float(np.mean(run(case, STEPS)["distance"][-1]))


@pytest.mark.slow
def test_the_literal_form_contradicts_the_papers_row():
    """The paper's row with beta = 0 equals expert 1; equation (1) as printed gives raw gradients there."""
    average, literal = run("ema, beta 0", STEPS), run("literal, beta 0", STEPS)
    np.testing.assert_allclose(average["loss"][1:], average["loss"][0], rtol=1e-4)
    assert min(literal["loss"][1:]) > 2 * literal["loss"][0]
    assert min(np.ravel(literal["distance"][-1])) > 0.5


@pytest.mark.slow
def test_evolved_experts_end_alike_unless_a_floor_or_snapshots_keep_them_apart():
    to_zero = last_distance("ema, cosine to zero")
    assert to_zero < 2e-4  # relative to expert 1's total drift
    assert last_distance("ema, floor 0.5") > 30 * to_zero
    assert last_distance("ema, cosine to zero, snapshots") > 300 * to_zero
    start = float(np.mean(run("ema, cosine to zero", STEPS)["distance"][0]))
    assert start > 100 * to_zero  # they were apart while the rate was high


def test_the_committed_result_is_reproduced():
    result = json.loads((RESULTS / "evolution_equation_one.json").read_text())
    assert set(result["results"]) == set(CASES)
    assert tuple(result["marks"]) == MARKS
    text = table(result["results"], result["steps"], result["command"])
    assert text == (RESULTS / "evolution_equation_one.md").read_text()
    distance = {case: np.mean(found["distance"][-1]) for case, found in result["results"].items()}
    assert distance["ema, cosine to zero"] < 1e-5 < 1e-3 < distance["ema, floor 0.1"]
