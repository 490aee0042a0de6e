"""What trains, by patterns: what they match, what is refused, and that frozen parameters cost nothing."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from anyexperts_jax.aot.step import lower_step
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.patterns import matching, require_match
from anyexperts_jax.models.init import abstract_params, init_params, named_leaves
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.config import TrainConfig
from anyexperts_jax.train.fit import state_bytes
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.optim import OptimConfig
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.state import abstract_state
from anyexperts_jax.train.trainable import what_trains
from train.stand_in import MODEL, run_config

ONE = make_mesh(MeshConfig(), jax.devices()[:1])
NAMES = named_leaves(abstract_params(MODEL))
ROUTER = [name for name in NAMES if "/router/" in name]
PATHS = ("head/kernel", "decoder/dense_0/mlp/up/kernel", "decoder/moe_layers/moe/router/kernel", "a/router")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**", PATHS),
        ("head/kernel", PATHS[:1]),
        ("*/kernel", PATHS[:1]),
        ("**/kernel", PATHS[:3]),
        ("**/router/**", PATHS[2:]),
        ("decoder/**", PATHS[1:3]),
        ("decoder/**/kernel", PATHS[1:3]),
        ("decoder/**/moe/**/kernel", PATHS[2:3]),
        ("decoder/dense_*/**", PATHS[1:2]),
        ("router", ()),
        ("**/outer/**", ()),  # a part is matched as a whole
        ("head.kernel", ()),  # no character but * is special
        ("**/**/kernel", PATHS[:3]),
    ],
)
def test_a_pattern_matches_whole_parts_of_a_name(pattern, found):
    assert matching(pattern, PATHS) == list(found)


def test_a_pattern_without_a_match_is_one_line_with_the_names_near_it():
    with pytest.raises(UserError) as error:
        require_match("train.trainable", "**/routers/**", NAMES)
    said = str(error.value)
    assert said.startswith(
        "train.trainable: '**/routers/**' matches no parameter; near it: decoder/moe_layers/moe/router"
    )
    assert "\n" not in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ()}, "train.trainable is empty"),
        ({"trainable": ("",)}, "empty pattern"),
        ({"learning_rates": ("**/router/**",)}, "must read PATTERN=RATE"),
        ({"learning_rates": ("**=fast",)}, "'fast' of ** must be a number"),
        ({"learning_rates": ("**=0",)}, "must be finite and > 0"),
        ({"learning_rates": ("**=inf",)}, "must be finite and > 0"),
        ({"learning_rates": ("**=1e-3", "** = 1e-4")}, "names '**' twice"),
    ],
)
def test_what_cannot_be_patterns_or_rates_is_refused_when_the_configuration_is_made(fields, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ("**/adapter/**",)}, "train.trainable: '**/adapter/**' matches no parameter"),
        ({"learning_rates": ("**/heads/**=1e-3",)}, "train.learning_rates: '**/heads/**' matches no parameter"),
        ({"trainable": ("**/router/**",), "learning_rates": ("head/**=1e-3",)}, "leaves frozen"),
    ],
)
def test_a_run_with_a_wrong_pattern_writes_nothing(fields, message, tmp_path):
    with pytest.raises(UserError) as error:
        train(run_config(**fields), tmp_path / "run", progress=False)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_everything_trains_unless_told_otherwise():
    trained = what_trains(run_config())
    assert trained.is_everything
    assert [group.tensors for group in trained.groups] == [len(NAMES)]


def test_the_optimiser_has_moments_of_trained_parameters_alone():
    config = run_config(trainable=("**/router/**", "**/importance/**"))
    trained = what_trains(config)
    state = abstract_state(MODEL, trained.optimizer(config), ONE)
    moments = {jax.tree_util.keystr(p, simple=True, separator="/") for p, leaf in leaves(state.opt_state) if leaf.ndim}
    wanted = {name for name in NAMES if "/router/" in name or "/importance/" in name}
    assert {name.split("/mu/")[1] for name in moments if "/mu/" in name} == wanted
    assert {name.split("/nu/")[1] for name in moments if "/nu/" in name} == wanted
    assert len(moments) == 2 * len(wanted)
    counted = sum(math.prod(NAMES[name].shape) for name in wanted)
    assert state_bytes(config, ONE) < state_bytes(run_config(), ONE)
    table = trained.table()
    assert [row[0] for row in table.rows] == ["**/router/**", "**/importance/**", "(frozen)"]
    assert sum(int(row[2].replace(",", "")) for row in table.rows[:2]) == counted
    assert sum(float(row[3].rstrip("%")) for row in table.rows) == pytest.approx(100, abs=0.02)


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_a_later_rate_overrides_an_earlier_one_and_each_has_its_row():
    rates = ("**/experts/**=0.5", "**/w_down_EFD=0.25")
    trained = what_trains(run_config(learning_rates=rates, optim=OptimConfig(lr=0.5, warmup_steps=2)))
    scales = named_leaves(trained.scales)
    assert scales["decoder/moe_layers/moe/experts/w_up_EDF"] == 1.0
    assert scales["decoder/moe_layers/moe/experts/w_down_EFD"] == 0.5
    assert {group.learning_rate: group.tensors for group in trained.groups} == {0.5: len(NAMES) - 1, 0.25: 1}


def test_moments_of_what_trains_are_split_like_their_parameters():
    config = run_config(trainable=("**/experts/**",))
    split = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    state = abstract_state(MODEL, what_trains(config).optimizer(config), split)
    places = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves(state.opt_state)}
    own = {name: leaf for name, leaf in places.items() if name.endswith("w_up_EDF")}
    parameter = state.params["decoder"]["moe_layers"]["moe"]["experts"]["w_up_EDF"]
    assert len(own) == 2
    assert all(leaf.sharding == parameter.sharding for leaf in own.values())
    assert not parameter.sharding.is_fully_replicated


@pytest.mark.slow
def test_frozen_parameters_take_no_memory_of_the_compiled_step():
    whole, part = (
        lower_step(config, ONE).compile().memory_analysis()
        for config in (run_config(), run_config(trainable=("**/router/**",)))
    )
    parameters = sum(math.prod(leaf.shape) for leaf in NAMES.values())
    trained = sum(math.prod(NAMES[name].shape) for name in ROUTER)
    spared = whole.argument_size_in_bytes - part.argument_size_in_bytes
    assert spared == 8 * (parameters - trained)  # two float32 moments of each
    assert part.temp_size_in_bytes < whole.temp_size_in_bytes


@pytest.mark.slow
def test_a_run_trains_what_it_is_told_resumes_and_records_it(tmp_path, capsys):
    told = {"trainable": ("**/router/**", "head/**"), "learning_rates": ("head/**=0.001",), "steps": 4}
    told |= {"checkpoint_every": 2, "eval_every": 2, "eval_examples": 2}
    config = run_config(**told)
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    train(half, tmp_path / "run", progress=False)
    _, before, _ = load_run(tmp_path / "run", "last")
    with pytest.raises(UserError, match=r"train.trainable"):
        train(run_config(**{**told, "trainable": ("**",)}), tmp_path / "run", progress=False)
    train(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "**/router/**" in said
    assert "(frozen)" in said
    _, after, _ = load_run(tmp_path / "run", "last")
    for name, value in named_leaves(after).items():
        moved = np.asarray(value).tobytes() != np.asarray(named_leaves(before)[name]).tobytes()
        assert moved == ("/router/" in name or name.startswith("head/")), name
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    groups = [record["groups"] for record in records if record["kind"] == "trained"]
    assert len(groups) == 2  # of the start and of the resume
    assert [(group["pattern"], group["learning_rate"]) for group in groups[0]] == [
        ("**/router/**", 0.01),
        ("head/**", 0.001),
        ("", None),
    ]


@pytest.mark.slow
def test_a_rate_of_its_own_scales_the_update(tmp_path):
    def moved(*rates):
        config = run_config(learning_rates=rates, steps=1, optim=OptimConfig(lr=0.01, warmup_steps=0, weight_decay=0.0))
        folder = tmp_path / str(len(rates))
        train(config, folder, progress=False)
        return named_leaves(load_run(folder, "last")[1])

    every, slower = moved(), moved("head/**=0.001")
    config = run_config()
    start = named_leaves(init_params(MODEL, jax.random.key(config.seed)))
    name = "head/kernel"
    np.testing.assert_allclose(slower[name] - start[name], 0.1 * (every[name] - start[name]), atol=2e-7)
    router = ROUTER[0]
    np.testing.assert_array_equal(slower[router], every[router])
