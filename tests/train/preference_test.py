"""DPO: the loss by hand, the reference, pairs in rows and micro-batches, and a run whose margin grows."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.small import FAST_COMPILE

from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.init import init_params, named_leaves, params_of_leaves
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import shard_batch
from anyexperts_jax.train.config import TrainConfig
from anyexperts_jax.train.distillation import TaughtState, teacher_params
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.objective import Objective
from anyexperts_jax.train.preference import better_alone, count_pairs, preference_sums
from anyexperts_jax.train.state import TrainState, init_state, state_shardings
from anyexperts_jax.train.step import accumulate, make_train_step, model_apply
from anyexperts_jax.train.trainable import what_trains
from train.stand_in import DATA, MODEL, linear_apply, linear_params, run_config, text_batch

# A pair of one token each: token 1 after token 0. The model gives 0.8 and 0.4 where the reference gives 0.5.
PAIR = make_batch(
    np.array([[0, 1, 0, 1]], np.int32),
    segment_BT=np.array([[0, 0, 1, 1]], np.int32),
    position_BT=np.array([[0, 1, 0, 1]], np.int32),
    loss_mask_BT=np.array([[True, False, True, False]]),
)
MODEL_BTY = np.log(np.array([[[0.2, 0.8], [0.5, 0.5], [0.6, 0.4], [0.5, 0.5]]], np.float32))
REFERENCE_BTY = np.zeros((1, 4, 2), np.float32)


@pytest.mark.parametrize(("beta", "loss"), [(1.0, math.log(1.5)), (0.5, math.log1p(2**-0.5)), (2.0, math.log(1.25))])
def test_the_loss_by_hand(beta, loss):
    """The margin is beta (log(0.8 / 0.5) - log(0.4 / 0.5)) = beta log 2, the loss -log sigmoid(margin)."""
    found = preference_sums(jnp.asarray(MODEL_BTY), jnp.asarray(REFERENCE_BTY), PAIR, beta)
    assert float(found.loss) == pytest.approx(loss, rel=1e-5)
    assert float(found.margin) == pytest.approx(beta * math.log(2), rel=1e-5)
    assert (int(found.right), int(found.pairs)) == (1, 1)
    swapped = preference_sums(jnp.asarray(MODEL_BTY)[:, [2, 1, 0, 3]], jnp.asarray(REFERENCE_BTY), PAIR, beta)
    assert float(swapped.margin) == pytest.approx(-beta * math.log(2), rel=1e-5)
    assert int(swapped.right) == 0


def test_it_is_computed_in_float32():
    half = preference_sums(jnp.asarray(MODEL_BTY, jnp.bfloat16), jnp.asarray(REFERENCE_BTY, jnp.bfloat16), PAIR, 1.0)
    assert half.loss.dtype == half.margin.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(MODEL_BTY, jnp.bfloat16), np.float64)
    logprobs = rounded - np.log(np.exp(rounded).sum(-1, keepdims=True))
    assert float(half.margin) == pytest.approx(logprobs[0, 0, 1] - logprobs[0, 2, 1], rel=1e-5)


def pairs(rows=4, length=12, per_row=1, seed=0):
    """Rows of pairs of segments, each with an answer of two or three tokens; the last row is padding."""
    rng = np.random.default_rng(seed)
    size = length // (2 * per_row)
    segment = np.tile(np.repeat(np.arange(2 * per_row), size), (rows, 1)).astype(np.int32)
    place = np.tile(np.arange(size), (rows, 2 * per_row)).astype(np.int32)
    answers = rng.integers(2, 4, (rows, 2 * per_row))
    mask = (place < size - 1) & (place >= size - 1 - np.repeat(answers, size, axis=1))
    valid = np.arange(rows)[:, None] < rows - 1
    return make_batch(
        rng.integers(0, 250, (rows, length)).astype(np.int32),
        segment_BT=segment,
        position_BT=place,
        loss_mask_BT=mask & valid,
        valid_BT=np.tile(valid, (1, length)),
    )


def quiet(params, batch, router_bias_LC, key, window):
    return linear_apply(params, batch, router_bias_LC, None, window)


def test_pairs_that_share_a_row_count_as_those_that_do_not():
    packed = pairs(rows=3, length=24, per_row=2)
    halves = [
        make_batch(
            packed.tokens_BT[:, part],
            segment_BT=packed.segment_BT[:, part] % 2,
            position_BT=packed.position_BT[:, part],
            loss_mask_BT=packed.loss_mask_BT[:, part],
            valid_BT=packed.valid_BT[:, part],
        )
        for part in (slice(0, 12), slice(12, 24))
    ]
    model, reference = linear_params(0), linear_params(1)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def sums(batch):
        ours, theirs = (quiet(params, batch, None, None, None)[0] for params in (model, reference))
        return preference_sums(ours, theirs, batch, 0.7)

    apart = [sums(half) for half in halves]
    for whole, *parts in zip(*(jax.tree.leaves(found) for found in (sums(packed), *apart)), strict=True):
        assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-5)
    assert int(count_pairs(packed)) == 4
    assert int(better_alone(packed).loss_mask_BT.sum()) < int(packed.loss_mask_BT.sum())


def test_micro_batches_add_up_to_the_whole_batch():
    """Also where they have different numbers of pairs: the last row is padding."""
    moe, batch, start = MODEL.moe, pairs(), linear_params(1)
    state = TrainState(jnp.int32(0), linear_params(0), TaughtState((), start), jnp.zeros((1, 5)))
    how = {"objective": Objective(beta=0.5)}
    whole, parts = (
        jax.jit(lambda n=n: accumulate(quiet, moe, n, state, batch, jax.random.key(0), **how))() for n in (1, 2)
    )
    names = {"answer_loss", "preference_loss", "reward_margin", "preference_accuracy"}
    assert names < set(whole[2])
    for name in names:
        assert float(parts[2][name]) == pytest.approx(float(whole[2][name]), rel=1e-5), name
    np.testing.assert_allclose(parts[0]["table"], whole[0]["table"], atol=1e-6)
    ours, theirs = (quiet(params, batch, None, None, None)[0] for params in (state.params, start))
    found = preference_sums(ours, theirs, batch, 0.5)
    assert float(whole[2]["preference_loss"]) == pytest.approx(float(found.loss) / 3, rel=1e-6)
    assert int(whole[1].preference.pairs) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "dpo"}, "train.loss='dpo' without train.start_from"),
        ({"loss": "dpo", "start_from": "run", "distillation": 0.5}, "each has its own loss; choose one"),
        ({"loss": "sft"}, "train.loss='sft' is unknown; valid: answers, dpo"),
        ({"dpo_beta": 0.0}, "train.dpo_beta=0.0 must be finite and > 0"),
    ],
)
def test_what_makes_no_preference_loss_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**fields)
    assert message in str(error.value)


def test_a_balance_loss_per_row_is_refused():
    switches = dataclasses.replace(MODEL.moe.switches, balance_scope="sequence")
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, switches=switches))
    with pytest.raises(UserError, match="a row holds both answers; set it to batch"):
        run_config(model=model, loss="dpo", start_from="run")


@pytest.mark.slow
def test_beside_an_adapter_the_reference_is_the_base():
    lora = LoraConfig(rank=2, patterns=("**/attention/*/kernel", "**/experts/**"))
    adapted = dataclasses.replace(MODEL, stack=dataclasses.replace(MODEL.stack, lora=lora))
    config = run_config(model=adapted, loss="dpo", start_from="run", trainable=("**/*_lora_*",))
    trained = what_trains(config)
    params = init_params(adapted, jax.random.key(0))
    state = init_state(adapted, trained.optimizer(config), params)
    moved = jax.tree.map(lambda kept, leaf: leaf + 0.3 if kept else leaf, trained.trainable, params)
    reference = teacher_params(state.opt_state, moved)
    base = {name: leaf for name, leaf in named_leaves(params).items() if "_lora_" not in name}
    batch, bias_LC = text_batch(), jnp.zeros(MODEL.router_bias_shape)

    def logits(model, params):
        run = jax.jit(lambda params: model_apply(model)(params, batch, bias_LC, None, None)[0])
        return run.lower(params).compile(compiler_options=FAST_COMPILE)(params)

    ours = [logits(adapted, one) for one in (reference, moved)]
    own = logits(MODEL, params_of_leaves(MODEL, base))
    np.testing.assert_allclose(ours[0], own, atol=1e-6)
    assert np.abs(np.asarray(ours[1] - own)).max() > 1e-3


@pytest.mark.slow
def test_the_margin_grows_in_a_run(tmp_path):
    train(run_config(steps=3), tmp_path / "base", progress=False)
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(DATA, domains=("mine",), folders=(f"mine={tmp_path / 'mine.jsonl'}",), held_out=0.2)
    told = {"loss": "dpo", "start_from": str(tmp_path / "base"), "dpo_beta": 0.5, "eval_examples": 4}
    result = train(run_config(data=data, steps=9, **told), tmp_path / "dpo", progress=False)
    records = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert steps[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-3)  # the model is its own reference
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert steps[-1]["reward_margin"] > 0.1 > steps[0]["reward_margin"]
    assert steps[-1]["preference_loss"] < steps[0]["preference_loss"] - 0.05
    scores = result.validation["domains"]["mine"]
    assert scores["loss"] == result.validation["loss"] < math.log(2) - 0.05
    assert scores["reward_margin"] > 0.1
    assert scores["preference_accuracy"] == 1
    assert scores["answer_loss"] > scores["loss"]


def step_on(sizes, dispatch="blocks"):
    """The report of one step on a mesh from a model that has left its reference, and the state after it."""
    stack = dataclasses.replace(MODEL.stack, execution=Execution(dispatch, overflow="fallback"))
    model = dataclasses.replace(MODEL, stack=stack)
    config = run_config(model, loss="dpo", start_from="run", dpo_beta=0.5)
    devices = jax.devices()[: math.prod(sizes)]
    mesh, trained = make_mesh(MeshConfig(*sizes), devices), what_trains(config)
    optimizer = trained.optimizer(config)
    start, params = (init_params(model, jax.random.key(seed)) for seed in (0, 1))
    moved = jax.tree.map(lambda a, b: a + 0.3 * b, start, params)
    state = dataclasses.replace(init_state(model, optimizer, start), params=moved)
    state = jax.device_put(state, state_shardings(model, optimizer, mesh))
    step = jax.jit(make_train_step(config, optimizer, model_apply(model, Placement(mesh)), trained.trainable))
    batch = shard_batch(mesh, pairs(rows=8))
    after, report = step.lower(state, batch).compile(compiler_options=FAST_COMPILE)(state, batch)
    return jax.device_get((report, after.params, optax.tree_utils.tree_get(after.opt_state, "mu")))


@pytest.fixture(scope="module")
def step_on_one_device():
    return step_on((1, 1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dispatch"),  # data x fsdp x expert x tensor x sequence
    [((2, 2, 2, 1, 1), "blocks"), ((1, 2, 2, 1, 2), "exchange")],
    ids=str,
)
def test_a_step_on_a_mesh_is_that_of_one_device(sizes, dispatch, step_on_one_device):
    """Also where the two answers of a row are on different devices, and where one device has only padding."""
    one, params_one, moments_one = step_on_one_device
    many, params_many, moments_many = step_on(sizes, dispatch)
    assert abs(float(one.scalars["reward_margin"])) > 1e-3
    for name, value in one.scalars.items():
        np.testing.assert_allclose(many.scalars[name], value, rtol=5e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(many.routing.load_LC, one.routing.load_LC)
    chex.assert_trees_all_close(params_many, params_one, rtol=0, atol=1e-4)
    chex.assert_trees_all_close(moments_many, moments_one, rtol=1e-3, atol=1e-6)
