import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.small import random_batch as media_batch
from models.small import random_params, small

from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.init import abstract_params, logical_axes
from anyexperts_jax.nn.config import AttentionConfig
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import param_shardings, shard_batch
from anyexperts_jax.train.losses import answer_scores
from anyexperts_jax.train.optim import OptimConfig, make_optimizer
from anyexperts_jax.train.state import TrainState, create_state, init_state
from anyexperts_jax.train.step import (
    accumulate,
    jit_train_step,
    make_eval_step,
    make_train_step,
    model_apply,
    split_batch,
)
from train.stand_in import LENGTH, MODEL, linear_apply, linear_params, random_batch, run_config

AXES = {"table": ("vocab", "embed")}
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def quiet(params, batch, router_bias_LC, key, window):
    """`linear_apply` without its noise. A sequence of level 2, 3 or 4 makes a step non-finite in one of three ways."""
    logits, trace = linear_apply(params, batch, router_bias_LC, None, window)
    poison = [jnp.any(jnp.asarray(batch.level_B) == level) for level in POISONS]
    logits = jnp.where(poison[0], jnp.nan, logits)
    losses = {**trace.losses, "z": jnp.where(poison[1], jnp.inf, trace.losses["z"])}
    root = jnp.sqrt(jnp.where(poison[2], logits - logits, 1.0)) - jnp.where(poison[2], 0.0, 1.0)
    return logits + root, dataclasses.replace(trace, losses=losses)  # root is 0, with a gradient of NaN if poisoned


POISONS = {2: "answer_loss", 3: "z_loss", 4: "grad_norm"}  # by level


def compiled(function):
    return jax.jit(function, compiler_options=FAST_COMPILE)


def linear_state(config):
    params = linear_params()
    optimizer = make_optimizer(config.optim, AXES)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((1, 5)))
    return optimizer, state


def linear_step(apply=quiet, **fields):
    config = run_config(optim=OptimConfig(lr=0.1, warmup_steps=2), steps=60, **fields)
    optimizer, state = linear_state(config)
    return compiled(make_train_step(config, optimizer, apply)), state


@pytest.fixture(scope="module")
def quiet_step():
    return linear_step()


def test_micro_batches_are_a_partition():
    batch = random_batch(rows=8)
    parts = split_batch(batch, 4)
    assert parts.tokens_BT.shape == (4, 2, 12)
    np.testing.assert_array_equal(np.sort(np.asarray(parts.example_B).ravel()), np.arange(8))
    np.testing.assert_array_equal(parts.tokens_BT[1], batch.tokens_BT[[1, 5]])


def test_accumulated_gradient_is_the_whole_batchs_and_the_loss_per_answer_token():
    """Sequences differ in answer tokens, so a mean of micro-batch means would be off."""
    batch, (_, state) = random_batch(), linear_state(run_config())
    moe = dataclasses.replace(MODEL.moe, balance_weight=0.5, importance_weight=0.25, z_weight=0.125)
    whole, parts = (compiled(lambda n=n: accumulate(quiet, moe, n, state, batch, jax.random.key(0)))() for n in (1, 4))
    np.testing.assert_allclose(parts[0]["table"], whole[0]["table"], atol=1e-7)
    for name in ("loss", "answer_loss", "importance_loss", "z_loss", "balance_loss"):
        np.testing.assert_allclose(parts[2][name], whole[2][name], rtol=1e-6)
    assert parts[1].answer_tokens == whole[1].answer_tokens == batch.loss_mask_BT.sum()
    assert parts[1].exact_answers == whole[1].exact_answers

    logits, trace = linear_apply(state.params, batch, None, None, None)
    scores = answer_scores(logits, batch.tokens_BT, batch.loss_mask_BT)
    answer = scores.loss_B.sum() / scores.tokens_B.sum().astype(jnp.float32)
    np.testing.assert_allclose(whole[2]["answer_loss"], answer, rtol=1e-6)
    balance = trace.losses["balance"][0]
    np.testing.assert_allclose(whole[2]["loss"], answer + balance * (0.5 + 0.25 * 2 + 0.125 * 3), rtol=1e-6)


def test_the_first_step_moves_by_the_learning_rate(quiet_step):
    step, state = quiet_step
    batch = random_batch()
    after, report = step(state, batch)
    predicting = np.unique(batch.tokens_BT[batch.loss_mask_BT])
    moved = np.abs(np.asarray(after.params["table"] - state.params["table"]))[predicting]
    np.testing.assert_allclose(
        np.median(moved), report.scalars["learning_rate"], rtol=0.01
    )  # Adam: the gradient's sign
    assert report.scalars["learning_rate"] == pytest.approx(0.05)  # half of 0.1: two steps of warm-up
    assert after.step == 1
    assert report.finite
    assert not np.any(after.router_bias_LC)  # loss-free balancing is off


def test_a_runs_step_donates_its_state():
    """Otherwise a run needs memory for two states, which would only show on a full device."""
    config = run_config()
    optimizer, mesh = make_optimizer(config.optim, logical_axes(MODEL)), make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(MODEL, optimizer, mesh, jax.random.key(0))
    after, _ = jit_train_step(config, optimizer, linear_apply, mesh)(state, random_batch())
    kept = [jax.tree_util.keystr(path) for path, a in jax.tree.leaves_with_path(state) if not a.is_deleted()]
    assert not kept
    assert not any(a.is_deleted() for a in jax.tree.leaves(after))


def test_steps_learn(quiet_step):
    step, state = quiet_step
    losses = []
    for _ in range(60):
        state, report = step(state, random_batch())
        losses.append(float(report.scalars["answer_loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("level", POISONS)
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(quiet_step, level):
    step, state = quiet_step
    batch = random_batch()
    batch.level_B[3] = level
    after, report = step(state, batch)
    assert not report.finite
    assert not np.isfinite(report.scalars[POISONS[level]])
    assert after.step == 1
    chex.assert_trees_all_equal(dataclasses.replace(after, step=state.step), state)


@pytest.mark.slow
def test_randomness_follows_seed_step_and_micro_batch():
    def losses(seed, parts):
        step, state = linear_step(linear_apply, seed=seed, accumulation=parts)
        at = lambda number: dataclasses.replace(state, step=jnp.asarray(number, jnp.int32))  # noqa: E731
        return [float(step(at(number), same_rows)[1].scalars["answer_loss"]) for number in (5, 6, 5)]

    same_rows = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), random_batch())
    first, second, again = losses(0, 1)
    assert first == again != second
    other_seed = losses(1, 2)
    assert other_seed[0] == other_seed[2] != other_seed[1]
    assert other_seed[0] != first
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 5), part) for part in range(2)]
    rows = [jax.tree.map(lambda x: x[:1], same_rows)] * 2
    drawn = [linear_apply(linear_params(), row, None, key, None)[0] for row, key in zip(rows, keys, strict=True)]
    scores = [answer_scores(logits, rows[0].tokens_BT, rows[0].loss_mask_BT) for logits in drawn]
    expected = sum(float(s.loss_B.sum()) for s in scores) / sum(int(s.tokens_B.sum()) for s in scores)
    np.testing.assert_allclose(other_seed[0], expected, rtol=1e-6)  # each micro-batch draws from its own key


def test_the_expert_bias_moves_by_its_rule_where_it_is_on():
    moe = dataclasses.replace(MODEL.moe, expert_bias=True, expert_bias_rate=0.5)
    step, state = linear_step(model=dataclasses.replace(MODEL, moe=moe))
    after, _ = step(state, random_batch())
    np.testing.assert_array_equal(after.router_bias_LC, [[-0.5, -0.5, 0, 0.5, 0.5]])  # loads 4 3 2 1 0, mean 2


def test_evaluation_counts_rows_with_an_answer():
    batch = random_batch()
    batch = dataclasses.replace(batch, loss_mask_BT=batch.loss_mask_BT & (np.arange(8) < 5)[:, None])
    sums = compiled(make_eval_step(quiet))(linear_params(), jnp.zeros((1, 5)), batch)
    assert sums.answers == 5
    assert sums.answer_tokens == batch.loss_mask_BT.sum()


# Every part that a mesh splits: both encoders, a dense and a MoE layer, sizes that all meshes below divide.
PARTS = small(
    {"num_experts": 8},
    {"num_layers": 2, "attention": AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)},
    vocab_size=260,
    pad_id=256,
    eos_id=259,
    max_length=LENGTH,
)


def skewed_batch():
    """Four sequences, each twice in a row, so that micro-batches are equal. The last one has no tokens."""
    batch = media_batch(PARTS, lengths=(20, 14, 7, 0), total=24)
    return jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)


def real_step_on(mesh, dispatch="blocks", accumulation=1):
    """The report of one step of the real model on a mesh, the new parameters, and their first moments."""
    model = dataclasses.replace(
        PARTS, stack=dataclasses.replace(PARTS.stack, execution=Execution(dispatch, overflow="fallback"))
    )
    config = run_config(model, accumulation=accumulation)
    axes, shapes = logical_axes(model), abstract_params(model)
    params = jax.device_put(random_params(model), param_shardings(mesh, axes, shapes))
    optimizer = make_optimizer(config.optim, axes)
    state = compiled(lambda params: init_state(config.model, optimizer, params))(params)
    step = compiled(make_train_step(config, optimizer, model_apply(config.model, Placement(mesh))))
    after, report = step(state, shard_batch(mesh, skewed_batch()))
    moments = optax.tree_utils.tree_get(after.opt_state, "mu")
    return jax.device_get((report, after.params, moments))


@pytest.fixture(scope="module")
def step_on_one_device():
    return real_step_on(make_mesh(MeshConfig(), jax.devices()[:1]))


STEP_MESHES = [  # data x fsdp x expert x tensor x sequence, dispatch, micro-batches
    ((2, 2, 2, 1, 1), "blocks", 1),
    ((8, 1, 1, 1, 1), "blocks", 1),
    ((2, 1, 1, 2, 2), "blocks", 2),
    ((2, 2, 2, 1, 1), "exchange", 1),
    ((1, 1, 8, 1, 1), "exchange", 1),
    ((1, 2, 1, 2, 2), "capacity", 1),
    ((2, 1, 2, 1, 2), "exchange", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dispatch", "accumulation"), STEP_MESHES, ids=str)
def test_a_step_on_a_mesh_is_that_of_one_device(sizes, dispatch, accumulation, step_on_one_device):
    """Losses, router statistics and gradients are those of the whole batch, though devices differ in their tokens."""
    one, params_one, moments_one = step_on_one_device
    mesh = make_mesh(MeshConfig(*sizes))
    many, params_many, moments_many = real_step_on(mesh, dispatch, accumulation)
    for name, value in one.scalars.items():
        np.testing.assert_allclose(many.scalars[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(many.routing.load_LC, one.routing.load_LC)
    np.testing.assert_array_equal(many.routing.real_slots_LM, one.routing.real_slots_LM)
    chex.assert_trees_all_close(params_many, params_one, rtol=0, atol=1e-4)
    # After one step the first moment is the gradient, up to clipping and a factor.
    chex.assert_trees_all_close(moments_many, moments_one, rtol=1e-3, atol=1e-6)
