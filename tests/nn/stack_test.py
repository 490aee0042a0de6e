import collections
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.remat import remat_policy
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.dispatch.in_place import reads_in_place
from anyexperts_jax.nn import stack as stack_module
from anyexperts_jax.nn.block import BlockContext
from anyexperts_jax.nn.config import AttentionConfig, StackConfig
from anyexperts_jax.nn.stack import Stack, empty_stack_cache
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from nn.layers import FAST_COMPILE, equations, random_params, run

MOE = AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3, rho_max=0.25, alpha=0.1)
CONFIG = StackConfig(
    d_model=8,
    num_layers=2,
    num_dense_layers=0,
    expert_d_ff=12,
    num_shared_experts=0,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    execution=Execution(dispatch="dense"),
)
B, T, D, L = 2, 5, 8, 2
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
VALID_BT = np.arange(T) < np.array([[5], [3]])
CONTEXT = BlockContext(
    jnp.asarray(np.tile(np.arange(T), (B, 1))),
    jnp.asarray(VALID_BT),
    jnp.asarray(np.tri(T, dtype=bool) & VALID_BT[:, None, :]),
)


def stack(moe=MOE, placement=None, execution=CONFIG.execution, **fields):
    return Stack(dataclasses.replace(CONFIG, execution=execution, **fields), moe, placement)


@functools.cache
def params():
    return random_params(stack(), X_BTD, CONTEXT)


@functools.cache
def jitted_loss_and_grad(**fields):
    module = stack(**fields)

    def loss(params, output_weight):
        y_BTD, trace, _ = module.apply({"params": params}, X_BTD, CONTEXT)
        losses = trace.losses["balance"].mean() + trace.losses["importance"].mean()
        return output_weight * (y_BTD.astype(jnp.float32) ** 2).mean() + losses, trace

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)


def loss_and_grad(output_weight=1.0, **fields):
    """(loss, trace), gradients: of the output's mean square and the router's losses."""
    return jitted_loss_and_grad(**fields)(params(), output_weight)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "routing", "exchanged", "dots"])
def test_remat_changes_neither_routing_nor_gradients(remat):
    (kept_loss, kept_trace), kept_grads = loss_and_grad()
    (loss, trace), grads = loss_and_grad(remat=remat)
    np.testing.assert_array_equal(trace.expert_ids_BTK, kept_trace.expert_ids_BTK)
    np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
    close(grads, kept_grads)


def primitives(jaxpr):
    """How often each primitive occurs in a jaxpr and in those inside it."""
    return collections.Counter(equation.primitive.name for equation in equations(jaxpr))


def test_remat_never_selects_again_and_keeps_more_by_name():
    counts = {}
    for remat in ("none", "full", "routing", "dots"):
        counts[remat] = primitives(jitted_loss_and_grad(remat=remat).trace(params(), 1.0).jaxpr.jaxpr)
    assert {count["top_k"] for count in counts.values()} == {2}  # real and virtual experts, in the forward pass alone
    dots = [counts[remat]["dot_general"] for remat in ("full", "routing", "dots", "none")]
    assert sorted(set(dots), reverse=True) == dots


@pytest.mark.slow
def test_rows_that_are_kept_do_not_travel_again():
    """Rows, expert ids and weights travel there, and rows back; then the gradients of all but the ids. Full remat
    repeats the way there only, because no gradient needs the rows that came back."""
    placement = Placement(make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2]))
    for remat, exchanges in {"none": 4 + 3, "full": 4 + 3 + 3, "exchanged": 4 + 3}.items():
        traced = jitted_loss_and_grad(placement=placement, remat=remat, execution=Execution("exchange")).trace(
            params(), 1.0
        )
        assert primitives(traced.jaxpr.jaxpr)["all_to_all"] == exchanges


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"remat": "full"}, {"remat": "dots", "scan_unroll": 2}, {}], ids=str)
def test_blocks_on_a_mesh_under_remat_and_scan(fields):
    placement = Placement(make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2]))
    (loss, trace), grads = loss_and_grad(placement=placement, execution=Execution(), **fields)
    (one_loss, one_trace), one_grads = loss_and_grad()
    np.testing.assert_array_equal(trace.expert_ids_BTK, one_trace.expert_ids_BTK)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
    close(grads, one_grads)


@pytest.mark.slow
def test_remat_through_the_block_dispatch():
    for residuals in ("saved", "recomputed"):
        grads = loss_and_grad(execution=Execution(residuals=residuals), remat="full")[1]
        close(grads, loss_and_grad()[1])


def test_the_router_losses_have_a_gradient_in_every_layer():
    moe = loss_and_grad(output_weight=0.0)[1]["moe_layers"]["moe"]
    for name in ("kernel", "virtual_bias"):
        grad_LX = np.asarray(moe["router"][name]).reshape(L, -1)
        assert (np.abs(grad_LX).max(1) > 1e-6).all()
    assert (np.abs(moe["importance"]["out"]["kernel"]).max(1) > 1e-6).all()
    np.testing.assert_array_equal(moe["experts"]["w_gate_EDF"][-1], 0.0)  # only the output depends on the last layer


@pytest.mark.slow
def test_bfloat16_has_finite_float32_gradients_near_float32s():
    (_, exact), (_, grads) = loss_and_grad(), loss_and_grad(dtype="bfloat16")
    for half, full in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert half.dtype == np.float32
        assert np.linalg.norm(half - full) < 0.1 * np.linalg.norm(full) + 1e-3


def decoding(**fields):
    """A step of decoding for two sequences, as a function of the parameters, and these."""
    module = stack(execution=Execution(), **fields)
    cache = empty_stack_cache(module.config, B, T)
    mask = jnp.asarray(np.tile(np.arange(T) <= 2, (B, 1, 1)))
    context = BlockContext(jnp.full((B, 1), 2), jnp.ones((B, 1), bool), mask)
    x_BTD = X_BTD[:, :1].astype(fields.get("dtype", "float32"))

    def step(params):
        return module.apply({"params": params}, x_BTD, context, None, cache)

    return step, random_params(module, X_BTD, CONTEXT)


@pytest.mark.parametrize(
    "fields",
    [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "param_dtype": "bfloat16"}, {"num_layers": 4, "moe_every": 2}],
    ids=str,
)
def test_a_step_of_decoding_reads_experts_in_place_and_changes_no_bit(fields, monkeypatch):
    step, own = decoding(**fields)
    in_place = jax.jit(step)(own)
    monkeypatch.setattr(stack_module, "reads_in_place", lambda *how, **also: False)
    chex.assert_trees_all_equal(in_place, jax.jit(lambda params: step(params))(own))


def test_a_step_of_decoding_copies_no_layer_of_experts(monkeypatch):
    """The time of a step would be that of reading all experts, not those that its tokens hit."""
    step, own = decoding()
    layer = re.compile(r"= f32\[(1,)?4,8,12\]")

    def copies(step):
        return len(layer.findall(jax.jit(step).lower(own).compile().as_text()))

    assert copies(step) == 0
    monkeypatch.setattr(stack_module, "reads_in_place", lambda *how, **also: False)
    assert copies(lambda params: step(params)) > 0


def test_a_step_of_decoding_stacks_no_caches_of_dense_layers():
    """Each step would take the stack apart and put it together again: a copy of the whole cache, twice."""
    step, own = decoding(num_layers=4, num_dense_layers=3)
    assert not re.findall(r"f32\[3,2,5,1,4\]", jax.jit(step).lower(own).compile().as_text())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"tokens": 3}, False),  # 9 slots of 4 experts: more than two each
        ({"execution": Execution("dense")}, False),
        ({"execution": Execution(implementation="reference")}, False),
        ({"execution": Execution(implementation="pallas_triton")}, True),
        ({"execution": Execution(implementation="pallas_triton"), "tokens": 300}, True),
        ({"execution": Execution(implementation="pallas_triton"), "dtype": jnp.dtype("bfloat16")}, False),
        ({"execution": Execution(implementation="pallas_tpu")}, False),  # whose tiles are 128 wide
        ({"placement": Placement(make_mesh(MeshConfig(data=2), jax.devices()[:2]))}, False),
    ],
    ids=str,
)
def test_only_tokens_of_one_device_read_experts_in_place(changed, expected):
    wide, narrow = (jax.ShapeDtypeStruct((8, *shape), jnp.float32) for shape in ((8, 12), (12, 8)))
    given = {"tokens": 2, "execution": Execution(), "placement": None, "dtype": jnp.dtype("float32")} | changed
    assert reads_in_place(MOE, weights=ExpertWeights(wide, wide, narrow), **given) == expected


def test_unknown_remat_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="remat='ful' is unknown; valid: none, full, routing, exchanged, dots"):
        StackConfig(remat="ful")
    with pytest.raises(UserError, match="remat='none' is unknown; valid: full, routing, exchanged, dots"):
        remat_policy("none")


@pytest.mark.slow
def test_an_unrolled_scan_is_the_same_function():
    scanned, unrolled = (run(stack(scan_unroll=n))(params(), X_BTD, CONTEXT) for n in (1, 2))
    close(unrolled[0], scanned[0])
    np.testing.assert_array_equal(unrolled[1].expert_ids_BTK, scanned[1].expert_ids_BTK)


def test_layers_have_their_own_parameters_and_biases():
    module = stack(dataclasses.replace(MOE, expert_bias=True))
    bias_LC = jnp.zeros((L, 5)).at[0, 1].set(100.0).at[1, 3].set(100.0)
    _, trace, _ = run(module)(params(), X_BTD, CONTEXT, bias_LC)
    ids = np.asarray(trace.expert_ids_BTK)[:, VALID_BT]
    assert (ids[0] == 1).any(-1).all()
    assert (ids[1] == 3).any(-1).all()
    swapped = jax.tree.map(lambda p: p[::-1], params())
    assert not np.allclose(
        run(module)(swapped, X_BTD, CONTEXT, bias_LC)[0], run(module)(params(), X_BTD, CONTEXT, bias_LC)[0]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0, "num_dense_layers": 0}, "num_layers=0 must be >= 1"),
        ({"num_layers": 1_000_000}, "num_layers=1000000 must be <= 1000"),
        ({"scan_unroll": 1_000_000}, "scan_unroll=1000000 must be <= 1000"),
        ({"num_dense_layers": 5}, r"num_dense_layers=5 must be in \[0, num_layers=4\]"),
        ({"moe_every": 2}, "moe_every=2 must divide num_layers - num_dense_layers = 3; set num_dense_layers"),
        ({"moe_every": 0}, "moe_every=0 must be >= 1"),
        ({"d_model": 0}, "d_model=0 must be >= 1"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; valid: float32, bfloat16"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be >= 0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be > 0"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(StackConfig(), **fields)
