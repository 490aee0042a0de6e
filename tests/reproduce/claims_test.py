"""The rule of the verdicts, and the claims on invented results that support, contradict or do not decide them."""

import pytest

from experiments.reproduce.claims import all_claims, better, equal
from experiments.reproduce.collect import Results
from experiments.reproduce.curves import DYNAMIC, STATIC, gains, one_checkpoint, retrained
from experiments.reproduce.figures import seed_levels
from experiments.reproduce.statistics import Summary
from reproduce.canned import SEEDS, figure3, noise, table3

EMPTY = Results({})


def interval(low, high, n=5):
    return Summary(n, (low + high) / 2, 0.01, low, high)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.05, "supported"),
        (-0.001, 0.05, "undecided at this scale"),
        (-0.03, 0.009, "not supported"),
        (-0.03, 0.011, "undecided at this scale"),
        (-0.05, -0.03, "not supported"),
    ],
)
def test_the_verdict_on_a_gain(low, high, verdict):
    assert better(interval(low, high)) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.019, 0.05, "supported"),
        (-0.021, 0.05, "undecided at this scale"),
        (-0.05, -0.021, "not supported"),
        (-0.05, -0.019, "undecided at this scale"),
    ],
)
def test_the_verdict_on_an_equal_score(low, high, verdict):
    assert equal(interval(low, high)) == verdict


def test_two_seeds_decide_nothing():
    assert better(interval(0.1, 0.2, n=2)) == "undecided at this scale"
    assert equal(interval(0.1, 0.2, n=2)) == "undecided at this scale"


def verdicts_of(*results):
    return {claim.statement: claim.verdict for claim in all_claims(*results)}


@pytest.mark.parametrize(("gain", "verdict"), [(0.04, "supported"), (-0.04, "not supported")])
def test_dynamic_is_judged_against_static(gain, verdict):
    found = verdicts_of(figure3(gain=gain), EMPTY)
    assert found["Dynamic beats static at equal real experts: one checkpoint"] == verdict
    assert found["Dynamic beats static at equal real experts: retrained for each budget"] == verdict


def test_a_cut_that_costs_nothing_and_one_that_does():
    free = verdicts_of(figure3(), EMPTY)
    assert free["40% fewer real experts, image and video, one checkpoint: the same score"] == "supported"
    assert free["10% fewer, text, one checkpoint: the same score"] == "supported"
    costly = verdicts_of(figure3(loss_at=lambda name, budget: -0.1 * (budget == 7.2) * (name == "nlp")), EMPTY)
    assert costly["40% fewer real experts, image and video, one checkpoint: the same score"] == "supported"
    assert costly["10% fewer, text, one checkpoint: the same score"] == "not supported"


def test_a_cut_is_shown_with_the_same_cut_of_a_static_model():
    cut = "40% fewer real experts, image and video, one checkpoint: the same score"
    evidence = {claim.statement: claim.evidence for claim in all_claims(figure3(), EMPTY)}[cut]
    assert evidence.endswith("control, static 8 cut to 4: +0.0 (+0.0 to +0.0)")


def test_ablations_are_judged():
    assert verdicts_of(EMPTY, table3(hsm=0.05))["Hidden-state modulation helps"] == "supported"
    assert verdicts_of(EMPTY, table3(hsm=0.0))["Hidden-state modulation helps"] == "not supported"
    loose = table3(hsm=0.005, spread=0.03)
    assert verdicts_of(EMPTY, loose)["Hidden-state modulation helps"] == "undecided at this scale"
    assert "Importance-aware routing helps" not in verdicts_of(EMPTY, loose)


def test_importance_is_judged_by_auc():
    statement = "Importance follows meaning: the paper's terms"
    assert verdicts_of(figure3(auc=0.7), EMPTY)[statement] == "supported"
    assert verdicts_of(figure3(auc=0.4), EMPTY)[statement] == "not supported"


def test_gains_are_interpolated_and_exclude_points_out_of_range():
    results = figure3(gain=0.04, seeds=(0,))
    (gain,) = gains(one_checkpoint(results, DYNAMIC, ""), one_checkpoint(results, STATIC, ""))
    assert gain == pytest.approx(0.04, abs=0.002)
    beyond = figure3(gain=0.04, seeds=(0,))
    short = Results({key: one for key, one in beyond.found.items() if key[0] != "static 10"})
    assert len(gains(retrained(short, "dynamic", ""), retrained(short, "static", ""))) == 1


def test_retrained_curves_take_only_seeds_that_have_every_budget():
    results = figure3()
    missing = Results({key: one for key, one in results.found.items() if key != ("static 4", 3)})
    assert retrained(missing, "static", "").seeds == [seed for seed in SEEDS if seed != 3]
    assert retrained(missing, "dynamic", "").seeds == list(SEEDS)


def test_salience_retrained_is_a_curve_if_it_has_several_budgets():
    found = figure3(gain=0.04).found
    statement = "Dynamic beats static at equal real experts: retrained for each budget, by salience (ours)"
    for seed in SEEDS:
        found["salience", seed] = found["dynamic 8.0", seed]
    assert statement not in verdicts_of(Results(found), EMPTY)
    for seed in SEEDS:
        found["salience 4.8", seed] = found["dynamic 4.8", seed]
    assert verdicts_of(Results(found), EMPTY)[statement] == "supported"


def test_seed_levels_sum_to_zero_and_hold_what_a_seeds_runs_share():
    curves = [one_checkpoint(figure3(gain=0.04), variant, "") for variant in (DYNAMIC, STATIC)]
    levels = seed_levels(curves, None)
    assert sum(levels.values()) == pytest.approx(0, abs=1e-9)
    shared = {seed: noise(seed) for seed in SEEDS}
    mean = sum(shared.values()) / len(shared)
    assert levels == pytest.approx({seed: value - mean for seed, value in shared.items()}, abs=0.003)
