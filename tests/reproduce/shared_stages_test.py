"""EvoMoE's experiments: what they declare, which stages their runs share, and which runs wait for which."""

import dataclasses
import pathlib
import subprocess
import sys
from collections import Counter

import pytest

from anyexperts_jax.core.errors import UserError
from experiments.reproduce import shared_stages
from experiments.reproduce.collect import load_kept
from experiments.reproduce.experiment import (
    EVOMOE_TABLES,
    GROUPS,
    load_experiment,
    run_from_json,
    run_to_json,
    runs_of,
    shared,
)
from experiments.reproduce.pool import _Pool, _Running
from experiments.reproduce.shared_stages import STORE_NAME, missing_stages, trained_start, up_to

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs"
BOTH = "evolution + DTR"
SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def committed():
    return {name: runs_of(*load_experiment(name, CONFIGS)) for name in EVOMOE_TABLES}


@pytest.fixture(scope="module")
def every(committed):
    """The runs of all experiments, by variant and seed."""
    return {key: run for runs in committed.values() for key, run in runs.items()}


@pytest.mark.slow
def test_the_committed_experiments_share_their_runs(committed):
    assert len(shared(list(committed.values()))) == 195
    ids = {}
    for runs in committed.values():
        assert {seed for _, seed in runs} == set(SEEDS)
        for key, run in runs.items():
            assert ids.setdefault(key, run.id) == run.id, f"{key} is not the same run in every table"


@pytest.mark.slow
def test_their_slots_are_the_runs_whose_results_are_committed(every):
    """They are compared by the ids that runs had when the results were made."""
    made = load_kept(CONFIGS.parent / "results" / "reproduce" / "evomoe")
    for seed in SEEDS:
        assert made[every["dynamic 8.0", seed].older_id].name == "dynamic 8.0"
        assert made[every["dynamic 8.0, DTR", seed].older_id].name == "dynamic 8.0, DTR"


@pytest.mark.slow
def test_only_the_table_evolve_differs_between_variants(every):
    for (_, seed), run in every.items():
        if run.evolve is not None:
            assert run.config == every["dense", seed].config
            assert run.evolve.warm_up.lr == run.evolve.evolving.lr == run.evolve.routing.lr


@pytest.mark.slow
def test_copies_train_for_as_long_as_evolved_ones(every):
    for (name, _), run in every.items():
        if run.evolve is not None and run.evolve.routing.steps and name != "copies, router alone":
            steps = sum(getattr(run.evolve, stage).steps for stage in run.evolve_run.stages)
            assert steps == 2800, name


@pytest.mark.slow
def test_stages_are_shared_by_all_that_have_them_in_common(every, tmp_path):
    counts = Counter(stage for run in every.values() for stage in missing_stages(run, tmp_path))
    stage_one = [count for name, count in counts.items() if name.startswith("warm_up")]
    assert sorted(stage_one) == [1] * len(SEEDS) + [36] * len(SEEDS), "evolving in stage I needs a stage I of its own"
    assert missing_stages(every["evolution + linear", 0], tmp_path) == missing_stages(every[BOTH, 0], tmp_path)
    assert missing_stages(every["snapshots + DTR", 0], tmp_path) != missing_stages(every[BOTH, 0], tmp_path)
    assert missing_stages(every[BOTH, 0], tmp_path).isdisjoint(missing_stages(every[BOTH, 1], tmp_path))
    assert len(missing_stages(every["MoE-tuning", 0], tmp_path)) == 1
    assert missing_stages(every["dynamic 8.0", 0], tmp_path) == frozenset()


@pytest.mark.slow
def test_a_stage_that_is_done_is_not_missing(every, tmp_path):
    dense = every["dense", 0]
    (name,) = missing_stages(dense, tmp_path)
    checkpoints = tmp_path / STORE_NAME / name / "warm_up" / "checkpoints"
    (checkpoints / "1800").mkdir(parents=True)
    assert missing_stages(dense, tmp_path) == {name}, "the stage stopped before its end"
    (checkpoints / "2000").mkdir()
    assert missing_stages(dense, tmp_path) == frozenset()
    assert len(missing_stages(every[BOTH, 0], tmp_path)) == 1, "only stage II is missing"


def test_a_start_is_trained_by_the_first_run_that_needs_it(tmp_path, monkeypatch):
    path, trained = tmp_path / "one.toml", []
    path.write_text('title = "x"\nbase = "smoke"\nstart = "smoke"\nseeds = [0, 1]\n[[variants]]\nname = "one"\n')
    runs = runs_of(*load_experiment(path))

    def train(config, folder):
        trained.append(config)
        (folder / "checkpoints" / str(config.train.steps)).mkdir(parents=True)

    monkeypatch.setattr(shared_stages, "train", train)
    start = runs["one", 0].start
    (name,) = missing_stages(runs["one", 0], tmp_path)
    assert {name} != missing_stages(runs["one", 1], tmp_path)
    half = tmp_path / STORE_NAME / name / "checkpoints" / str(start.train.steps // 2)
    half.mkdir(parents=True)
    assert missing_stages(runs["one", 0], tmp_path) == {name}, "the start stopped before its end"
    for _ in range(2):
        assert trained_start(start, tmp_path, lambda line: None) == tmp_path / STORE_NAME / name
    assert trained == [start]
    assert missing_stages(runs["one", 0], tmp_path) == frozenset()


@pytest.mark.slow
def test_settings_of_later_stages_do_not_change_a_stage(every):
    run = every["evolution + DTR, experts train on", 0].evolve_run
    assert up_to(run, "evolving") == up_to(every["evolution + linear", 0].evolve_run, "evolving")
    assert up_to(run, "evolving").stages == ("warm_up", "evolving")
    assert up_to(run, "warm_up").stages == ("warm_up",)
    early = every["evolving in stage I", 0].evolve_run
    assert up_to(early, "warm_up").evolve.evolve_in_warm_up


@pytest.mark.slow
def test_runs_wait_for_a_stage_that_another_one_trains(every, tmp_path):
    pool = _Pool(tmp_path, [(0,), (0,)], lambda line: None, ())
    first, same, other = every["dense", 0], every[BOTH, 0], every["MoE-tuning", 1]
    assert pool.first_ready([first, same]) is first
    process = subprocess.Popen([sys.executable, "-c", ""])
    pool.running = [_Running(first, process, tmp_path, 0, 0.0)]
    assert pool.first_ready([same, other]) is other
    assert pool.first_ready([same]) is None
    assert pool.first_ready([]) is None
    process.wait()
    pool.running = []
    assert pool.first_ready([same]) is same


@pytest.mark.slow
def test_a_run_of_stages_survives_the_disk_and_its_id_covers_its_settings(every):
    one = every[BOTH, 3]
    assert run_from_json(run_to_json(one)) == one
    assert run_from_json(run_to_json(one)).id == one.id
    assert dataclasses.replace(one, name="another", stage=7).id == one.id
    other = dataclasses.replace(one.evolve, trains="all")
    assert dataclasses.replace(one, evolve=other).id != one.id
    assert len({run.id for run in every.values()}) == 195


@pytest.mark.slow
def test_quick_goes_through_the_same_stages(every):
    for name in EVOMOE_TABLES[:-1]:
        for (variant, seed), run in runs_of(*load_experiment(name, CONFIGS), quick=True).items():
            assert seed == 0
            assert run.evolve_run.stages == every[variant, 0].evolve_run.stages
            assert max(getattr(run.evolve, stage).steps for stage in run.evolve_run.stages) <= 20


def test_a_wrong_stage_is_refused_with_the_valid_ones(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(
        'title = "x"\nbase = "evolve_smoke"\nrecipe = "evolve_and_evaluate"\n'
        '[[variants]]\nname = "one"\nstages = ["warmup"]\n'
    )
    with pytest.raises(UserError, match="variant 'one': stage='warmup' is unknown; valid: warm_up, evolving, routing"):
        load_experiment(path)
    path.write_text(path.read_text().replace('"warmup"', '"evolving"'))
    with pytest.raises(UserError, match=r"variant 'one'.*evolve.warm_up.steps must be >= 1"):
        runs_of(*load_experiment(path))
    assert set(GROUPS) == {"all", "evomoe"}
