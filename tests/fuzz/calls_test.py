"""Calls of the public functions at random: each gives the right answer or is refused in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn.layers import without_type_check
from typecheck import unchecked

from anyexperts_jax import AnyExpertsConfig, MoE, expert_mlp, moe_apply_stats, route, shift_budget
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.routing.reference import route_reference

TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}
# What a hurried user passes where an array or a number is meant.
ANYTHING = (
    None, True, 0, -1, 3, 2.5, float("nan"), float("inf"), 2**40, "", "a word", b"bytes", [], (), {}, [1, 2], (3, 1),
    (2.0, 3.0), [[1.0], [1.0, 2.0]], object, np.float32(3), np.zeros((2, 0)), np.array("x"), jnp.array([True]),
)  # fmt: skip
HOLD = {
    "jax": jnp.asarray,
    "numpy": np.asarray,
    "float64": lambda a: np.asarray(a, np.float64 if a.dtype.kind == "f" else a.dtype),
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "fortran": np.asfortranarray,
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(a.tolist()),
}
DAMAGE = {
    "axis gone": lambda a: a[0],
    "axis more": lambda a: a[None],
    "shorter": lambda a: a[:-1],
    "narrower": lambda a: a[..., :-1],
    "transposed": lambda a: a.T,
    "empty": lambda a: a[:0],
    "integers": lambda a: a.astype(np.int32),
    "bools": lambda a: a > 0,
    "complex": lambda a: a.astype(np.complex64),
    "float8": lambda a: jnp.asarray(a, jnp.float8_e5m2),
    "bfloat16": lambda a: jnp.asarray(a, jnp.bfloat16),
    "objects": lambda a: a.astype(object),
    "nan": lambda a: _with_first(a, np.nan if a.dtype.kind == "f" else -1),
    "infinite": lambda a: _with_first(a, np.inf if a.dtype.kind == "f" else 10**6),
}


def _with_first(array, value):
    changed = array.copy()
    changed.reshape(-1)[:1] = value
    return changed


def broken(rng, given):
    """The arguments in forms that callers may have, up to two of them damaged or replaced by anything."""
    held = {name: _held(rng, value) for name, value in given.items()}
    for name in rng.choice(list(given), size=min(len(given), rng.integers(0, 3)), replace=False):
        if isinstance(given[name], np.ndarray) and rng.random() < 0.7:
            held[name] = DAMAGE[str(rng.choice(list(DAMAGE)))](given[name])
        else:
            held[name] = ANYTHING[rng.integers(len(ANYTHING))]
    return held


def _held(rng, value):
    return HOLD[str(rng.choice(list(HOLD)))](value) if isinstance(value, np.ndarray) else value


def swiglu(x, gate, up, down):
    with np.errstate(over="ignore", invalid="ignore"):
        g = x @ gate
        return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def assert_close(actual, expected, name):
    dtype = actual.dtype.name
    wide = np.asarray(jnp.asarray(actual, jnp.float32), np.float64)
    assert wide.shape == expected.shape
    np.testing.assert_allclose(wide, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], err_msg=name)


def wide(value):
    return np.asarray(jnp.asarray(np.asarray(value)), np.float64)


def make_experts(rng, experts, width, hidden):
    shapes = {"w_gate_EDF": (width, hidden), "w_up_EDF": (width, hidden), "w_down_EFD": (hidden, width)}
    return {name: 0.5 * rng.normal(size=(experts, *shape)).astype(np.float32) for name, shape in shapes.items()}


def call_moe_apply(rng):
    tokens, experts, slots = int(rng.choice([1, 3, 8, 20])), int(rng.choice([1, 3, 5])), rng.choice([1, 2])
    width, hidden = rng.choice([1, 4, 6], size=2)
    ids = rng.integers(0, experts + 1, (tokens, slots)).astype(np.int32)
    if slots > 1:
        ids[:, 1] = np.where(ids[:, 1] == ids[:, 0], experts, ids[:, 1])
    given = {
        "x_ND": rng.normal(size=(tokens, width)).astype(np.float32),
        **make_experts(rng, experts, width, hidden),
        "ids": ids,
        "weights": np.where(ids < experts, rng.random(ids.shape), 0).astype(np.float32),
        "virtual": rng.random(tokens).astype(np.float32),
        "dispatch": str(rng.choice(["blocks", "capacity", "dense"])),
        "implementation": [None, "xla", "reference", "pallas_tpu"][rng.choice(4, p=[0.4, 0.3, 0.25, 0.05])],
        "capacity_factor": float(rng.choice([1.0, 50.0])),
        "overflow": str(rng.choice(["drop", "fallback"])),
        "num_sequences": 1,
    }
    held = broken(rng, given)
    ids, weights, virtual = (held.pop(name) for name in ("ids", "weights", "virtual"))
    plan = object.__new__(RoutingPlan)  # skips the check of its annotations, which only tests enable
    arrays = {"expert_ids_NK": ids, "weights_NK": weights, "virtual_weight_N": virtual}
    unused = ("importance_N", "slots_N", "real_slots_N", "virtual_slots_N")
    rest = dict.fromkeys(unused, jnp.zeros(tokens, jnp.int32)) | {"importance_N": jnp.zeros(tokens)}
    spec = PlanSpec(experts, expected_real_slots=1.0)
    for name, value in (arrays | rest | {"losses": {}, "metrics": {}, "spec": spec}).items():
        object.__setattr__(plan, name, value)
    operands = [held.pop(name) for name in ("x_ND", "w_gate_EDF", "w_up_EDF", "w_down_EFD")]
    y_ND, stats = unchecked(moe_apply_stats)(operands[0], plan, *operands[1:], **held)
    if stats.dropped:
        assert (held["dispatch"], held["overflow"]) == ("capacity", "drop")
        return
    x, gate, up, down, ids, weights, virtual = map(wide, (*operands, ids, weights, virtual))
    expected = virtual[:, None] * x
    for n, k in np.ndindex(ids.shape):
        if (e := int(ids[n, k])) < experts:
            expected[n] += weights[n, k] * swiglu(x[n], gate[e], up[e], down[e])
    # A value that is not finite spreads to every token with "dense", and only to its own token with the others.
    finite = (
        np.isfinite(expected).all(axis=1) & np.isfinite(np.concatenate([a.ravel() for a in (gate, up, down)])).all()
    )
    finite &= np.isfinite(x).all() | (held["dispatch"] != "dense")
    assert_close(y_ND[finite], expected[finite], "y_ND")
    assert not np.isfinite(wide(y_ND[~np.isfinite(expected).all(axis=1)])).all(axis=-1).any()


def call_expert_mlp(rng):
    experts, rows = rng.choice([1, 3], size=2)
    width, hidden = rng.choice([1, 4, 6], size=2)
    given = {
        "x_ECD": rng.normal(size=(experts, rows, width)).astype(np.float32),
        "counts_E": rng.integers(0, rows + 2, experts).astype(np.int32),
        **make_experts(rng, experts, width, hidden),
        "implementation": [None, "xla", "reference"][rng.integers(3)],
    }
    held = broken(rng, given)
    y = unchecked(expert_mlp)(**held)
    x, counts, gate, up, down = (wide(held[name]) for name in list(given)[:5])
    live = (np.arange(x.shape[1]) < counts[:, None])[..., None]
    with np.errstate(invalid="ignore"):
        expected = np.where(live, [swiglu(*own) for own in zip(x, gate, up, down, strict=True)], 0)
    sound = [all(np.isfinite(weight).all() for weight in own) for own in zip(gate, up, down, strict=True)]
    finite = np.isfinite(expected).all(axis=-1) & np.array(sound)[:, None]
    assert_close(y[finite], expected[finite], "y_ECD")


CONFIGS = (
    AnyExpertsConfig(num_experts=6, num_virtual=2, k_min=2, k_max=4, rho_max=0.25),
    AnyExpertsConfig(num_experts=6, num_virtual=2, k_min=1.5, k_max=4.25, rho_max=0.5, scores="sigmoid", iar="off"),
    AnyExpertsConfig.static_top_k(6, 2),
)


def call_route(rng):
    config, tokens = CONFIGS[rng.integers(len(CONFIGS))], int(rng.choice([1, 3, 8]))
    given = {
        "logits_NC": rng.normal(size=(tokens, config.num_columns)).astype(np.float32),
        "importance_logits_N": rng.normal(size=tokens).astype(np.float32),
        "valid_N": rng.random(tokens) < 0.8,
        "bias_C": None,
        "window": (2, 2) if config.k_min == config.k_max else [None, (2, 3), [1.5, 2.5]][rng.integers(3)],
        "num_sequences": 1,
        "key": None,
    }
    held = broken(rng, given)
    plan = unchecked(route)(config, **held)
    logits, z = wide(held["logits_NC"]), wide(held["importance_logits_N"])
    finite = np.isfinite(logits).all(axis=1) & ~np.isnan(z)
    valid = np.ones(len(z), bool) if held["valid_N"] is None else np.asarray(held["valid_N"])
    window = None if held["window"] is None else tuple(held["window"])
    clean = np.where(finite[:, None], logits, 0), np.where(finite, np.nan_to_num(z, posinf=80, neginf=-80), 0)
    expected = route_reference(config, *clean, valid, window=window)
    for name in ("expert_ids_NK", "slots_N", "real_slots_N"):
        np.testing.assert_array_equal(np.asarray(getattr(plan, name))[finite], expected[name][finite], name)
    assert_close(plan.weights_NK[finite], expected["weights_NK"][finite], "weights_NK")


@functools.cache
def _layer(config):
    """A layer and its parameters."""
    layer = without_type_check(MoE)(config, 4)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 2, 4)))
    return layer, params


def call_layer(rng):
    layer, params = _layer(CONFIGS[rng.integers(len(CONFIGS))])
    batch, length = int(rng.choice([1, 2])), int(rng.choice([1, 3]))
    given = {
        "x_BTD": rng.normal(size=(batch, length, 4)).astype(np.float32),
        "valid_BT": rng.random((batch, length)) < 0.8,
        "modality_BT": rng.integers(0, 4, (batch, length)).astype(np.int32),
        "window": None,
    }
    held = broken(rng, given)
    x = held.pop("x_BTD")
    y_BTD, trace = layer.apply(params, x, **held)
    assert y_BTD.shape == np.shape(x)
    window = {"window": held.pop("window")}
    as_jax = {name: None if value is None else jnp.asarray(np.asarray(value)) for name, value in held.items()}
    expected, _ = layer.apply(params, jnp.asarray(np.asarray(x)), **as_jax, **window)
    np.testing.assert_array_equal(y_BTD, expected)
    assert trace.slots_BT.shape == y_BTD.shape[:2]


def call_shift_budget(rng):
    config = CONFIGS[rng.integers(2)]
    target = broken(rng, {"target_real": float(rng.uniform(0.5, 6))})["target_real"]
    shifted = unchecked(shift_budget)(config, target)
    assert shifted.expected_real_slots == pytest.approx(float(target))


CALLS = (call_moe_apply, call_moe_apply, call_expert_mlp, call_route, call_layer, call_shift_budget)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_call_is_right_or_ends_in_one_line(fuzz_case):
    rng = np.random.default_rng([24, fuzz_case])
    refusal = _refusal(CALLS[fuzz_case % len(CALLS)], rng)
    assert "\n" not in refusal
    assert len(refusal) < 400


def _refusal(call, rng):
    try:
        call(rng)
    except UserError as error:
        return str(error)
    return ""
