"""Experiments are read strictly from TOML, and each run is made once, in order."""

import dataclasses
import pathlib

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.strict import flatten
from experiments.reproduce import experiment
from experiments.reproduce.collect import collect, load_kept
from experiments.reproduce.experiment import (
    TABLES,
    config_digest,
    load_experiment,
    run_from_json,
    run_to_json,
    runs_of,
    shared,
)
from experiments.reproduce.output import missing_text
from experiments.reproduce.run_folder import prepare
from experiments.reproduce.run_result import save_result

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs"
MINIMAL = """
title = "a table"
base = "smoke"
seeds = [0, 1]
[[variants]]
name = "late"
stage = 2
set = ["optim.lr=1e-3"]
[[variants]]
name = "early"
budgets = [4.8]
keep = [1]
"""


def write(folder, text, name="one.toml"):
    path = folder / name
    path.write_text(text)
    return path


def load(folder, text, **options):
    return runs_of(*load_experiment(write(folder, text)), **options)


def test_runs_come_by_stage_and_seed(tmp_path):
    runs = load(tmp_path, MINIMAL)
    assert list(runs) == [("early", 0), ("early", 1), ("late", 0), ("late", 1)]
    run = runs["late", 1]
    assert (run.config.seed, run.config.data.seed, run.config.optim.lr) == (1, 1, 1e-3)
    assert run.budgets == (run.config.model.moe.expected_real_slots,)
    assert [one.keep for one in runs.values()] == [False, True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "sedes = [1]", "unknown key variants[1].sedes; did you mean seeds"),
        ("sedes = [1]\n" + MINIMAL, "unknown key sedes; did you mean seeds"),
        (MINIMAL.replace("[0, 1]", "[0, 0]"), "names a seed twice"),
        (MINIMAL.replace("[0, 1]", "[]"), "seeds is empty"),
        (MINIMAL.replace('"late"', '"early"'), "two variants have the same name"),
        (MINIMAL.replace("optim.lr=1e-3", "optim.rl=1e-3"), "variant 'late': config smoke: unknown key optim.rl"),
        (MINIMAL.replace("[4.8]", "[99.0]"), "variant 'early': target_real=99 is out of reach"),
        (MINIMAL.replace("stage = 2", 'stage = "2"'), "stage"),
        ('start = "smok"\n' + MINIMAL, "no config 'smok'"),
        ('start = "smoke"\n' + MINIMAL.replace("optim.lr=1e-3", "train.start_from=runs/a"), "train.start_from=runs/a"),
        ('start = "smoke"\nrecipe = "evolve_and_evaluate"\n' + MINIMAL, "leave start out"),
        ('title = "x"\nbase = "smoke"', "variants"),
        ("title = ", "not valid TOML"),
        ('like = "one.toml"', "names the file itself"),
        ('like = "nowhere.toml"', "cannot read experiment"),
    ],
)
def test_inconsistent_experiments_are_refused(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_like_supplies_missing_keys(tmp_path):
    write(tmp_path, MINIMAL, "base_of.toml")
    runs = load(tmp_path, 'title = "another"\nlike = "base_of.toml"\nseeds = [7]')
    assert list(runs) == [("early", 7), ("late", 7)]


def test_two_files_cannot_be_like_each_other(tmp_path):
    write(tmp_path, 'like = "one.toml"', "other.toml")
    with pytest.raises(UserError, match="or one that is like it"):
        load(tmp_path, 'like = "other.toml"')


def test_a_like_may_lie_elsewhere_and_have_the_same_name(tmp_path):
    write(tmp_path, MINIMAL)
    (tmp_path / "small").mkdir()
    path = write(tmp_path / "small", 'like = "../one.toml"\ntitle = "small"')
    one, found = load_experiment(path)
    assert (one.title, one.base, found) == ("small", "smoke", path)


def test_an_unknown_name_is_refused_with_the_nearest_one(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean figure3"):
        load_experiment("figur3", CONFIGS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run this in a checkout"):
        load_experiment("figure3")


def test_quick_takes_fewer_seeds_and_other_steps(tmp_path):
    quick = '[quick]\nseeds = [1]\nset = ["train.steps=4"]\nvalidation_examples = 1000\n'
    text = MINIMAL.replace("[[variants]]", f"{quick}[[variants]]", 1)
    runs = load(tmp_path, text, quick=True)
    amounts, most = (next(iter(found.values())).evaluation for found in (runs, load(tmp_path, text)))
    assert amounts.test_examples < most.test_examples
    assert amounts.validation_examples == most.validation_examples, "quick never takes more examples"
    assert list(runs) == [("early", 1), ("late", 1)]
    assert {run.config.train.steps for run in runs.values()} == {4}
    assert not {run.id for run in runs.values()} & {run.id for run in load(tmp_path, text).values()}


def test_a_runs_id_covers_everything_that_decides_its_result(tmp_path):
    one = load(tmp_path, MINIMAL)["early", 0]
    assert dataclasses.replace(one, name="another", keep=True, stage=5).id == one.id
    assert dataclasses.replace(one, budgets=(4.8, 5.6)).id != one.id
    assert dataclasses.replace(one, recipe="another").id != one.id
    assert dataclasses.replace(one, config=dataclasses.replace(one.config, seed=9)).id != one.id
    other = dataclasses.replace(one.config, optim=dataclasses.replace(one.config.optim, lr=0.5))
    assert dataclasses.replace(one, config=other).id != one.id
    assert run_from_json(run_to_json(one)) == one
    assert run_from_json(run_to_json(one)).id == one.id


def test_the_variants_of_a_seed_start_from_one_run_that_saw_other_examples(tmp_path):
    runs = load(tmp_path, 'start = "smoke"\n' + MINIMAL)
    starts = {seed: {runs[name, seed].start for name in ("early", "late")} for seed in (0, 1)}
    assert [len(same) for same in starts.values()] == [1, 1]
    for seed, (start,) in starts.items():
        assert (start.seed, start.data.seed) == (seed, 1000 + seed)
        assert start.optim.lr != 1e-3, "a variant's own settings are not the start's"
    one, scratch = runs["early", 0], load(tmp_path, MINIMAL)["early", 0]
    assert one.config == scratch.config
    assert one.id != scratch.id
    assert run_from_json(run_to_json(one)) == one
    assert run_from_json(run_to_json(one)).id == one.id


def test_a_new_field_with_its_default_finds_committed_results_again(tmp_path, monkeypatch):
    one = load(tmp_path, MINIMAL)["early", 0]
    before = one.older_id
    fuller = lambda config: {**flatten(config), "train.new_field": 3}  # noqa: E731
    monkeypatch.setattr("experiments.reproduce.experiment.flatten", fuller)
    assert dataclasses.replace(one).older_id == before


def test_a_changed_default_makes_another_run(tmp_path, monkeypatch):
    """A run with the same overrides over other defaults is another run: its result is not reused."""
    before = load(tmp_path, 'start = "smoke"\n' + MINIMAL)["early", 0]

    def slower(config):
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, b2=0.9))

    older = before.older_id
    monkeypatch.setattr(experiment, "RunConfig", lambda: slower(RunConfig()))
    after = dataclasses.replace(before, config=slower(before.config), start=slower(before.start))
    assert after.older_id == older, "the old ids did not tell them apart"
    assert after.id != before.id
    assert config_digest(after.start) != config_digest(before.start)


def test_a_changed_code_version_makes_another_run(tmp_path, monkeypatch):
    one = load(tmp_path, MINIMAL)["early", 0]
    before = one.id, config_digest(one.config)
    monkeypatch.setattr(experiment, "CODE_VERSION", experiment.CODE_VERSION + 1)
    assert dataclasses.replace(one).id != before[0]
    assert config_digest(one.config) != before[1]


def test_experiments_share_runs(tmp_path):
    first = load(tmp_path, MINIMAL)
    same = MINIMAL.replace('"late"', '"other name"').replace("keep = [1]", "keep = [0]").replace("stage = 2", "")
    second = load(tmp_path, same)
    runs = shared([first, second])
    assert len(runs) == 4
    assert [(run.name, run.config.seed, run.keep) for run in runs] == [
        ("early", 0, True),
        ("late", 0, False),
        ("early", 1, True),
        ("late", 1, False),
    ]


@pytest.fixture(scope="module")
def committed():
    return {name: runs_of(*load_experiment(name, CONFIGS)) for name in TABLES}


@pytest.mark.slow
def test_the_committed_experiments_share_their_runs(committed):
    assert len(shared(list(committed.values()))) == 140
    assert committed["table1"].keys() == committed["figure3"].keys()
    ids = {}
    for runs in committed.values():
        for key, run in runs.items():
            assert ids.setdefault(key, run.id) == run.id, f"{key} is not the same run in every table"


@pytest.mark.slow
def test_the_committed_experiments_compare_like_with_like(committed):
    """Only the routing policy differs between variants; every seed has its own data, shared by all variants."""
    seeds = {seed for _, seed in committed["figure3"]}
    assert len(seeds) >= 5
    for runs in committed.values():
        for (_, seed), run in runs.items():
            default = committed["table3"]["dynamic 8.0", seed].config
            assert run.start == committed["table3"]["dynamic 8.0", seed].start
            model = dataclasses.replace(run.config.model, moe=default.model.moe)
            assert dataclasses.replace(run.config, model=model) == default


def test_quick_shares_runs_too():
    runs = [runs_of(*load_experiment(name, CONFIGS), quick=True) for name in TABLES]
    assert len(shared(runs)) == 28


@pytest.mark.slow
def test_committed_results_are_found_and_reported_as_older(committed, tmp_path):
    """A page can still be made from its records; results that a newer run replaces are no longer mentioned."""
    runs = committed["table3"]
    kept = load_kept(CONFIGS.parent / "results" / "reproduce")
    results = collect(runs, tmp_path, kept)
    assert set(results.found) == set(runs)
    assert results.missing == ()
    assert set(results.older) == set(runs)
    assert f"{len(runs)} of them are of an older version of the code" in missing_text({"table3": results})
    key, run = next(iter(runs.items()))
    save_result(dataclasses.replace(results.found[key], id=run.id), prepare(run, tmp_path))
    assert set(collect(runs, tmp_path, kept).older) == set(runs) - {key}
