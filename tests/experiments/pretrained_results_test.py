"""Checks the committed results on published models."""

import json
import pathlib

import pytest

from experiments.bench import pretrained_pods

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
COMPILED = [case for case in pretrained_pods.CASES if "memory" in (pretrained_pods.read(case) or {})]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_every_compiled_step_fits_and_its_command_is_on_the_page(case):
    step = pretrained_pods.read(case)
    assert step["devices"] == pretrained_pods.DEVICES[case.topology]
    assert step["free"] == pytest.approx(1 - sum(step["memory"].values()) / step["hbm"])
    assert step["free"] > 0
    assert case.command in (RESULTS / "pretrained_pods.md").read_text()


def test_the_page_of_pods_matches_its_files():
    assert (RESULTS / "pretrained_pods.md").read_text() == pretrained_pods.page()


def test_policies_of_smollm2_keep_their_order():
    """The oracle is best at each budget, and the dense model equals the split one with all experts."""
    rows = json.loads((RESULTS / "pretrained" / "policies.json").read_text())["rows"]
    dense, own = rows[:2]
    assert (dense["policy"], own["policy"]) == ("dense", "own")
    assert dense["perplexity"] == pytest.approx(own["perplexity"], rel=1e-3)
    assert dense["time"] == 1
    by_budget = {}
    for row in rows[2:]:
        by_budget.setdefault(row["budget"], {})[row["policy"]] = row
    assert len(by_budget) == 3
    for budget, found in by_budget.items():
        assert min(found.values(), key=lambda row: row["perplexity"])["policy"] == "oracle"
        assert found["static"]["experts_a_token"] == budget
        assert found["static"]["perplexity"] > own["perplexity"]
