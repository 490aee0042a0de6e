"""Options of `python -m experiments.reproduce` give the right request; end_to_end_test runs the command."""

import dataclasses
import os
import pathlib

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.strict import flatten
from experiments.reproduce.__main__ import main
from experiments.reproduce.command import Request
from experiments.reproduce.experiment import SCALES
from experiments.reproduce.reproduce import of_seeds, parameters_of

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_a_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def by_variant(scale):
    request = Request(("figure3", "figure4"), scale=scale)
    return {(plan.name, *key): run for plan in request.plans(request.tables) for key, run in plan.runs.items()}


@pytest.mark.slow
def test_small_has_the_same_tables_of_a_larger_model():
    tiny, small = by_variant("tiny"), by_variant("small")
    assert list(tiny) == list(small)
    for key, run in small.items():
        assert run.moe == tiny[key].moe, "the same routing"
        assert (run.budgets, run.keep, run.stage) == (tiny[key].budgets, tiny[key].keep, tiny[key].stage)
        assert run.config.model.stack.d_model == 768
    run = small["figure3", "dynamic 8.0", 0]
    moved = {k for k, v in flatten(run.start.model).items() if v != flatten(run.config.model)[k]}
    assert {key.split(".")[0] for key in moved} == {"moe"}, "a start and the runs from it differ only in routing"
    assert not {run.id for run in small.values()} & {run.id for run in tiny.values()}


def test_small_runs_one_at_a_time_and_has_its_own_page():
    assert Request(("all",), scale="small").side_by_side == 1
    assert Request(("all",)).side_by_side == os.cpu_count()
    assert Request(("all",), workers=3, scale="small").side_by_side == 3
    runs = pathlib.Path("runs")
    assert Request(("all",), scale="small").page_folder(runs).name == "small"
    outs = {Request(("all",), scale=scale, quick=True).page_folder(runs) for scale in SCALES}
    assert outs == {runs / "tables", runs / "tables_small"}
    command = Request(("table1",), scale="small", quick=True).command
    assert command == "python -m experiments.reproduce table1 --scale small --quick"


def test_every_option_reaches_the_request(monkeypatch):
    asked = []
    monkeypatch.setattr("experiments.reproduce.command.reproduce", lambda request, note: asked.append(request))
    assert main(["table1", "--scale", "small", "--seeds", "3", "4", "--workers", "2", "--set", "a=1"]) == 0
    assert asked == [Request(["table1"], scale="small", seeds=[3, 4], workers=2, set=["a=1"])]
    assert main(["table1"]) == 0
    defaults = {
        field.name: field.default for field in dataclasses.fields(Request) if field.name not in ("tables", "set")
    }
    assert {name: getattr(asked[1], name) for name in defaults} == defaults


def test_seeds_select_a_share_of_the_runs():
    request = Request(("table2", "figure4"))
    found = request.plans(request.tables)
    shares = [of_seeds(found, seeds) for seeds in ((0, 3), (1,), (2, 4))]
    for place, plan in enumerate(found):
        parts = [share[place].runs for share in shares]
        assert {seed for _, seed in parts[0]} == {0, 3}
        assert {key: run for part in parts for key, run in part.items()} == plan.runs
    with pytest.raises(UserError, match="no run has seed 9; the seeds are 0, 1, 2, 3, 4"):
        of_seeds(found, (0, 9))


@pytest.mark.slow
def test_the_number_of_parameters_is_counted():
    def millions(*tables, scale="tiny"):
        return round(parameters_of(Request(tables, scale=scale).plans(tables)) / 1e6, 1)

    assert (millions("figure4"), millions("figure4", scale="small")) == (0.3, 140.2)
    (plan,) = Request(("evomoe-experts",)).plans(("evomoe-experts",))
    dense, mixture = plan.runs["MoE-tuning", 0].config.model, millions("evomoe-experts")
    assert mixture > 0.05 + dense.vocab_size * dense.stack.d_model / 1e6, "the experts are counted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--scale", "smal"], "scale='smal' is unknown; valid: tiny, small"),
        (["mine.toml", "--scale", "small"], "mine.toml has a base of its own, leave --scale out"),
        (["evomoe", "--scale", "small"], "no experiment 'evomoe-components'; valid: table1"),
        (["table1", "--seeds", "7"], "no run has seed 7"),
    ],
)
def test_inconsistent_options_are_refused_in_one_line(arguments, message, capsys):
    assert main([*arguments, "--quick", "--only", "runs"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
