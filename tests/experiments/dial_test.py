"""The experiment `dial`: the whole command on a random model, and its differences and verdicts by hand."""

import dataclasses
import json
import math
import pathlib

import pytest
from pretrained.tiny_hub import tiny_checkpoint

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.tokenizers.train import train_tokenizer
from experiments.dial.__main__ import main
from experiments.dial.measure import Point, point_at
from experiments.dial.page import command_of, page_text, read_result, write_result
from experiments.dial.plan import KINDS, Plan, text_of
from experiments.dial.runs import Outcome
from experiments.dial.verdicts import SERIES, STATIC_K, advantage, judge, mean_points

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
SENTENCES = [
    f"the {one} sat on the {other} and said {i}"
    for i, one in enumerate(("cat", "dog", "cow"))
    for other in ("mat", "hat", "table", "chair")
]
SIZES = {"experts": 5, "shared": 1, "virtual": 1, "width": 2.0, "budgets": (3, 2)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dial")
    shape = {"vocab_size": 300, "num_hidden_layers": 1, "pad_token_id": None, "eos_token_id": 299}
    model = tiny_checkpoint(folder / "model", "llama", **shape)
    train_tokenizer(SENTENCES, 300).save(model)
    rows = [json.dumps({"text": f"{line}. " * 4}) for line in SENTENCES * 8]
    (folder / "train.jsonl").write_text("\n".join(f"{row}" for row in rows))
    (folder / "test.txt").write_text(". ".join(SENTENCES[::-1] * 8))
    return folder


def options(folder, *more):
    words = ["--model", folder / "model", "--train", folder / "train.jsonl", "--test", folder / "test.txt"]
    words += ["--run", folder / "run", "--experts", 5, "--shared", 1, "--virtual", 1, "--width", 2, "--budget", 2]
    words += ["--steps", 2, "--batch-size", 8, "--length", 16, "--test-tokens", 128, "--seeds", 0]
    return [str(word) for word in (*words, "--set", "data.held_out=0.2", *more)]


@pytest.mark.slow
def test_the_whole_command_and_a_second_call(files, capsys, monkeypatch):
    for name in ("random", "paper"):  # nothing that the other two kinds do not do
        monkeypatch.delitem(KINDS, name)
    assert main(options(files)) == 0
    told = capsys.readouterr()
    assert "Perplexity at the experts" in told.out
    assert "2 of 2" in told.err
    result = read_result(files / "run")
    assert [one.kind for one in result.outcomes] == ["dense", "untrained", *KINDS]
    points = {(one.kind, point.policy, point.budget): point for one in result.outcomes for point in one.points}
    assert points["static", "merged", None].nats == points["dense", "dense", None].nats  # only routing trained
    assert {point.budget for key, point in points.items() if key[:2] == ("static", "static")} == {1, 2, 3}
    assert 1.5 < points["salience", "importance", 2].realised < 2.5
    page = (files / "run" / "dial.md").read_text()
    assert page == page_text(result)
    assert "Not measured yet" in page
    assert "undecided at this scale" in page
    assert main(options(files, "--times", "--rounds", 1)) == 0
    assert capsys.readouterr().err.count("done before") == 4
    timed = read_result(files / "run").times
    assert timed.ratios["dense"] == {"": 1.0}
    assert set(timed.ratios["AnyExperts by salience"]) == {"2"}
    assert "Medians of 1 interleaved rounds" in (files / "run" / "dial.md").read_text()
    assert main(options(files, "--times", "--steps", 4)) == 2
    assert "holds no finished training" in capsys.readouterr().err


def made_up(kind, seed, losses, policy="static", realised=None):
    """An outcome whose passes have these losses by budget."""
    points = [Point(policy, k, k, k if realised is None else realised[k], nats) for k, nats in losses.items()]
    return Outcome(kind, seed, "", tuple(points))


def outcomes(gain=0.0):
    """Three seeds in which static k loses 0.1 nats an expert; importance gains `gain` at 2.5 and at 2 experts."""
    found = [made_up("untrained", 0, {2: 1.4, 3: 1.3})]
    for seed in range(3):
        static = made_up("static", seed, {k: 1.4 - 0.1 * k + 0.01 * seed for k in (1, 2, 3, 4)})
        layers = made_up("static", seed, {2: 1.3 + 0.01 * seed, 3: 1.2 + 0.01 * seed}, "static_layers")
        found.append(dataclasses.replace(static, points=(*static.points, *layers.points)))
        own = {3: 1.15 - gain + 0.01 * seed, 2: 1.2 - gain + 0.01 * seed}
        found.append(made_up("salience", seed, own, "importance", {3: 2.5, 2: 2.0}))
    return found


def test_a_difference_is_taken_at_the_realised_experts():
    salience = next(one for one in SERIES if one.kind == "salience")
    assert advantage(outcomes(), STATIC_K, 3) == {0: 0, 1: 0, 2: 0}
    assert advantage(outcomes(0.02), salience, 3) == pytest.approx({0: 0.02, 1: 0.02, 2: 0.02})  # static at 2.5: 1.15
    outside = [one for one in outcomes() if one.kind == "static"] + [
        made_up("salience", 0, {3: 1.0}, "importance", {3: 4.5})
    ]
    assert advantage(outside, salience, 3) == {}
    realised, nats, sd = mean_points(outcomes(), salience)[3]
    assert (realised, nats, sd) == pytest.approx((2.5, 1.16, 0.01))


def test_verdicts_follow_the_rule_of_the_reproduction():
    def verdicts(found):
        return {one.statement: one for one in judge(found, (3, 2))}

    name = "AnyExperts by salience beats static k"
    assert verdicts(outcomes(0.02))[name].verdict == "supported"
    assert verdicts(outcomes(0.02))[name].effect.mean == pytest.approx(0.02)
    assert verdicts(outcomes(-0.02))[name].verdict == "not supported"
    assert verdicts(outcomes(0.02)[:5])[name].verdict == "undecided at this scale"  # two seeds
    found = verdicts(outcomes())
    helps = found["Self-distillation helps static k"]
    assert helps.by_budget[3].mean == pytest.approx(1.3 - 1.11)
    assert helps.by_budget[2].mean == pytest.approx(1.4 - 1.21)
    layers = found["Static per layer beats static k"]
    assert (layers.verdict, layers.effect.mean) == ("not supported", pytest.approx(-0.1))
    assert found["D2DMoE's threshold beats static k"].effect.n == 0


class Bench:
    """Stands in for a bench whose text gets 0.8 of the experts that a policy is set to."""

    def __init__(self, monkeypatch):
        from types import SimpleNamespace

        import experiments.dial.measure as measure

        self.asked = []
        self.m = SimpleNamespace(config=SimpleNamespace(moe=SimpleNamespace(experts_in_reach=20)))
        monkeypatch.setattr(measure, "run_at", self.run)

    def run(self, bench, policy, asked):
        import numpy as np

        from anyexperts_jax.evaluate.policies import Pass

        self.asked.append(asked)
        return Pass(np.full((1, 2), asked), 0.8 * asked, 0.0, 0.0)


def test_a_policy_is_set_until_the_text_gets_the_budget(monkeypatch):
    bench = Bench(monkeypatch)
    point = point_at(bench, "score_gap", 10)
    assert bench.asked == pytest.approx([10, 12, 12.4])
    assert (point.budget, point.realised) == (10, pytest.approx(9.92))
    assert point.asked == point.nats == bench.asked[-1]


def test_the_page_names_every_option_that_differs(tmp_path):
    plan = Plan(tmp_path / "m", tmp_path / "a b.txt", tmp_path / "t", tmp_path / "run", **SIZES, set=("optim.b1=0.8",))
    told = command_of(json.loads(json.dumps(dataclasses.asdict(plan), default=str)), "--times")
    assert "--train '" in told
    assert "--budget 3 2" in told
    assert "--width 2" in told
    assert told.endswith("--times")
    assert "--set optim.b1=0.8" in told
    assert "--steps" not in told


def test_a_page_can_be_written_of_what_is_there(tmp_path, files):
    from experiments.dial.page import Result

    plan = Plan(files / "model", files / "train.jsonl", files / "test.txt", tmp_path)
    values = {**json.loads(json.dumps(dataclasses.asdict(plan), default=str)), "budgets": [3, 2], "sources": {}}
    dense = Outcome("dense", 0, "", (Point("dense", None, None, None, math.log(20)),))
    result = Result(values, (dense, *outcomes(0.02)), "cpu", {"python": "3"})
    page = write_result(result, tmp_path).read_text()
    assert "| dense | 20.00 | 20.00 |" in page
    assert "| AnyExperts by salience beats static k | supported | +0.020 (+0.020 to +0.020) |" in page
    assert "**Not finished: 6 of 12 trainings.**" in page
    assert read_result(tmp_path) == result
    assert (tmp_path / "dial.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": 5}, "--shared 5 must be below --experts 5"),
        ({"budgets": (4,)}, "--budget 4 must be from 2 to below 4, the experts without the shared ones"),
        ({"budgets": (2, 2)}, "--budget 2 2 names a budget twice"),
        ({"seeds": (1, 1)}, "--seeds 1 1 names a seed twice"),
        ({"width": 5.0}, "--width 5 must be at most 4"),
        ({"steps": 1}, "--steps 1 must be >= 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Plan(*[tmp_path] * 4, **{**SIZES, **changes})


def test_a_text_is_read_from_lines_or_as_it_is(files, tmp_path):
    assert text_of(files / "train.jsonl", "--train").startswith("the cat sat")
    assert text_of(files / "test.txt", "--test").startswith("the cow sat")
    (tmp_path / "bad.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"--train .*bad.jsonl, line 1: there is no column 'text'"):
        text_of(tmp_path / "bad.jsonl", "--train")
    plan = Plan(files / "none", files / "none", files / "none", tmp_path)
    with pytest.raises(UserError, match=r"cannot read --model .*none: No such file"):
        plan.sources  # noqa: B018


def test_the_committed_page_matches_its_figures():
    result = read_result(RESULTS)
    assert (RESULTS / "dial.md").read_text() == page_text(result)
    assert [one.kind for one in result.outcomes].count("static") == len(result.plan["seeds"])
    (dense,) = (one for one in result.outcomes if one.kind == "dense")
    for outcome in result.outcomes:
        for point in outcome.points:
            if point.policy == "merged":  # only routing trained
                assert point.nats == pytest.approx(dense.points[0].nats, abs=1e-5)
            elif point.policy != "dense":
                assert point.nats > dense.points[0].nats
                assert point.realised == pytest.approx(point.budget, abs=0.3)
