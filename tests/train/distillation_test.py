"""Self-distillation and the curriculum over budgets: what is drawn, what is compared, what a checkpoint holds."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import FAST_COMPILE

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import init_params, named_leaves
from anyexperts_jax.train.config import TrainConfig
from anyexperts_jax.train.curriculum import budget_windows, draw_budget
from anyexperts_jax.train.distillation import divergence, hidden_distance
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.state import init_state
from anyexperts_jax.train.step import hidden_apply, make_train_step, model_apply
from anyexperts_jax.train.trainable import what_trains
from train.stand_in import MODEL, run_config, text_batch

BUDGETS = (1.6, 2.0, 2.4)  # of MODEL, whose own window gives 2.4
STATIC = dataclasses.replace(MODEL, moe=AnyExpertsConfig.static_top_k(4, 3))


def test_each_step_draws_one_budget_by_seed_and_step_alone():
    windows = budget_windows(MODEL, BUDGETS)
    draws = [float(draw_budget(BUDGETS, windows, 3, step)[0]) for step in range(60)]
    again = [float(jax.jit(lambda step: draw_budget(BUDGETS, windows, 3, step)[0])(step)) for step in (7, 31, 59)]
    assert again == [draws[7], draws[31], draws[59]]
    assert {round(budget, 4) for budget in draws} == set(BUDGETS)
    assert min(sum(abs(d - b) < 1e-4 for d in draws) for b in BUDGETS) > 8
    assert draws != [float(draw_budget(BUDGETS, windows, 4, step)[0]) for step in range(60)]


def test_a_budget_is_a_window_of_the_model():
    assert budget_windows(MODEL, BUDGETS) == ((1.0, 3.0), (1.5, 3.5), (2.0, 4.0))
    assert budget_windows(STATIC, (1, 3)) == ((1, 1), (3, 3))


@pytest.mark.parametrize(
    ("model", "budgets", "message"),
    [
        (MODEL, (2.8,), "train.budgets: 2.8 needs windows up to 4.5 slots, above model.moe.k_max=4"),
        (MODEL, (5.0,), "train.budgets: target_real=5 is out of reach"),
        (STATIC, (1.5,), "train.budgets: 1.5 is no whole number"),
        (STATIC, (4.0,), "above model.moe.k_max=3, the model's own; raise that"),
        (STATIC, (9.0,), "must be from 1 to 4 experts"),
    ],
)
def test_a_budget_that_no_window_gives_is_refused_with_the_configuration(model, budgets, message):
    with pytest.raises(UserError) as error:
        run_config(model=model, budgets=budgets)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation": 1.5}, "must be in [0, 1]"),
        ({"distillation": 0.5}, "without train.start_from"),
        ({"hidden_distillation": -1.0}, "train.hidden_distillation=-1.0 must be finite and >= 0"),
        ({"hidden_distillation": 0.5}, "train.hidden_distillation=0.5 without train.distillation"),
    ],
)
def test_a_teacher_that_learned_nothing_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**fields)
    assert message in str(error.value)


def test_the_divergence_is_that_of_the_definition_at_the_positions_that_count():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 2, 3, 5)).astype(np.float32) * 3
    mask = np.array([[True, False, True], [False, True, False]])

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    nats = (softmax(p) * np.log(softmax(p) / softmax(q))).sum(-1)
    np.testing.assert_allclose(
        divergence(jnp.asarray(p), jnp.asarray(q), jnp.asarray(mask)), nats[mask].sum(), rtol=1e-5
    )
    half = divergence(jnp.asarray(p, jnp.bfloat16), jnp.asarray(q, jnp.bfloat16), jnp.asarray(mask))
    assert half.dtype == jnp.float32
    assert float(divergence(jnp.asarray(p), jnp.asarray(p), jnp.asarray(mask))) == pytest.approx(0, abs=1e-6)


def one_step(budgets, **fields):
    config = run_config(start_from="elsewhere", budgets=budgets, distillation=0.5, **fields)
    trained = what_trains(config)
    optimizer = trained.optimizer(config)
    params = init_params(MODEL, jax.random.key(0))
    state = init_state(MODEL, optimizer, params)
    step = jax.jit(make_train_step(config, optimizer, model_apply(MODEL), trained.trainable))
    return state, *step(state, text_batch())


@pytest.mark.slow
def test_the_teacher_is_the_model_at_its_own_window_and_stays_as_it_was():
    before, after, report = one_step((2.4,), trainable=("**/router/**", "head/**"))
    assert float(report.scalars["distillation_loss"]) == pytest.approx(0, abs=1e-6)  # it is its own teacher
    assert float(report.scalars["budget"]) == pytest.approx(2.4)
    held = named_leaves(after.opt_state.teacher)
    assert set(held) == {name for name in named_leaves(before.params) if "/router/" in name or name.startswith("head/")}
    for name, value in held.items():
        np.testing.assert_array_equal(value, named_leaves(before.params)[name])
    assert not np.array_equal(after.params["head"]["kernel"], before.params["head"]["kernel"])
    _, _, less = one_step((1.6,), trainable=("**/router/**", "head/**"))
    scalars = {name: float(value) for name, value in less.scalars.items()}
    assert scalars["distillation_loss"] > 1e-6
    auxiliary = 0.01 * scalars["balance_loss"] + 0.001 * scalars["importance_loss"]
    learned = 0.5 * scalars["answer_loss"] + 0.5 * scalars["distillation_loss"]
    assert scalars["loss"] == pytest.approx(learned + auxiliary, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_is_resumed_draws_and_distils_as_one_that_never_stopped(tmp_path):
    train(run_config(steps=3), tmp_path / "base", progress=False)
    told = {"start_from": str(tmp_path / "base"), "budgets": BUDGETS, "distillation": 0.7}
    told |= {"checkpoint_every": 2, "eval_every": 2, "eval_examples": 2}
    train(run_config(**told, steps=4), tmp_path / "whole", progress=False)
    config = run_config(**told, steps=4)
    # The learning rate depends on the number of steps, so a stop is simulated by removing the later checkpoint.
    train(config, tmp_path / "parts", progress=False)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
    train(config, tmp_path / "parts", progress=False)
    runs = [named_leaves(load_run(tmp_path / name, "last")[1]) for name in ("whole", "parts")]
    for name, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][name], err_msg=name)
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    drawn = [[r["budget"] for r in record if r["kind"] == "train"] for record in records]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 4


def test_the_distance_of_hidden_states_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    theirs, ours = ([rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 2, 3, 4))] for _ in range(2))
    mask = np.array([[True, False, True], [False, True, False]])

    def layers(given):
        return np.concatenate([one.reshape(-1, 2, 3, 4) for one in given])

    wanted = np.square(layers(ours) - layers(theirs)).sum(-1) / np.square(layers(theirs)).sum(-1)
    arrays = [[jnp.asarray(one, jnp.float32) for one in given] for given in (theirs, ours)]
    found = hidden_distance(*arrays, jnp.asarray(mask))
    np.testing.assert_allclose(found, wanted.mean(0)[mask].sum(), rtol=1e-5)
    half = [[one.astype(jnp.bfloat16) for one in given] for given in arrays]
    assert hidden_distance(*half, jnp.asarray(mask)).dtype == jnp.float32
    assert float(hidden_distance(arrays[0], arrays[0], jnp.asarray(mask))) == 0


@pytest.mark.slow
def test_the_stream_after_every_block_is_what_is_compared():
    model = dataclasses.replace(MODEL, stack=dataclasses.replace(MODEL.stack, num_layers=3, num_dense_layers=1))
    params, batch = init_params(model, jax.random.key(0)), text_batch()
    bias_LC = jnp.zeros(model.router_bias_shape)
    run = jax.jit(lambda params: hidden_apply(model)(params, batch, bias_LC, None, None))
    ours = run.lower(params).compile(compiler_options=FAST_COMPILE)(params)
    assert sorted(one.shape for one in ours.hidden) == [(2, *batch.tokens_BT.shape, 16), (*batch.tokens_BT.shape, 16)]


@pytest.mark.slow
def test_hidden_states_are_a_term_beside_the_divergence():
    _, _, same = one_step((2.4,), hidden_distillation=2.0)
    assert float(same.scalars["hidden_loss"]) == pytest.approx(0, abs=1e-6)
    _, _, less = one_step((1.6,), hidden_distillation=2.0)
    scalars = {name: float(value) for name, value in less.scalars.items()}
    assert scalars["hidden_loss"] > 1e-6
    auxiliary = 0.01 * scalars["balance_loss"] + 0.001 * scalars["importance_loss"]
    learned = 0.5 * scalars["answer_loss"] + 0.5 * scalars["distillation_loss"] + 2 * scalars["hidden_loss"]
    assert scalars["loss"] == pytest.approx(learned + auxiliary, rel=1e-5)
