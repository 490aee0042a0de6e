"""The fast path against the token-by-token NumPy oracle: over 2400 distinct random configurations with slow tests, some
290 without them, and 1600 windows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from anyexperts_jax.core import switches as options
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.routing.reference import route_reference
from anyexperts_jax.routing.route import route
from routing.compiled import FAST_COMPILE

N = 8
# (E, V, K): few, because every new shape compiles every operation anew. The second has fewer experts than slots.
SHAPES = ((6, 2, 5), (4, 2, 5), (4, 0, 3))
FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}


# Picks one of several options: drawn by hypothesis, which shrinks failing cases, or by a random number generator.
Choose = Callable[[Sequence[Any]], Any]


def _quarters(low: float, high: float) -> list[float]:
    """Multiples of 1/4: exact in float32, and half of them on a rounding edge."""
    return [q / 4 for q in range(int(np.ceil(low * 4)), int(np.floor(high * 4)) + 1)]


def draw_config(choose: Choose, shape: tuple[int, int, int]) -> AnyExpertsConfig:
    """Random values for every switch; raises UserError if they are incompatible."""
    E, V, K = shape
    pick = lambda choices: choose(get_args(choices))  # noqa: E731
    rounding = pick(options.SlotRounding)
    k_max = choose(_quarters(K - 0.75, K) if rounding == "stochastic" else _quarters(K - 0.5, K + 0.25))
    scores = choose(("softmax", "sigmoid"))
    iar = choose(["add", "add", "multiply_logits", f"multiply_{scores}", "off"])
    groups = choose([g for g in (1, 2, 3, 4) if E % g == 0])
    return AnyExpertsConfig(
        num_experts=E,
        num_virtual=V,
        k_min=choose(_quarters(1, k_max)),
        k_max=k_max,
        rho_max=choose([0.0, 0.2, 0.25, 0.5, 0.99]) if V else 0.0,
        slot_rounding=rounding,
        cap_rounding=pick(options.CapRounding),
        iar=iar,
        scores=scores,
        selection=pick(options.Selection),
        virtual_logits=pick(options.VirtualLogits),
        normalisation=pick(options.Normalisation),
        scaling_factor=choose([1.0, 2.5]),
        expert_bias=choose([False, True]),
        num_groups=groups,
        groups_kept=choose(range(1, groups + 1)),
        balance_scope=pick(options.BalanceScope),
        importance_regulariser=choose(("logit_l2", "mean_target", "salience")),
        importance_target=choose([0.25, 0.5]),
        slot_gradient=pick(options.SlotGradient),
    )


@dataclasses.dataclass
class Problem:
    logits_NC: np.ndarray
    z_N: np.ndarray
    valid_N: np.ndarray | None
    bias_C: np.ndarray | None
    window: tuple[float, float] | None
    num_sequences: int
    seed: int


def draw_problem(choose: Choose, config: AnyExpertsConfig) -> Problem:
    seed = choose(range(2**31))
    rng = np.random.default_rng(seed)
    C = config.num_columns
    logits_NC = rng.normal(size=(N, C)) * choose([0.5, 1.0, 3.0])
    z_N = rng.normal(size=N) * choose([0.0, 1.0, 4.0])
    # Logits on a coarse grid make ties; at w = 1/2 real and virtual columns tie too. At any other w, rounding breaks
    # ties between sums over groups, in float64 as in float32, so there ties are made only with a single group.
    if choose([False, True]) and (config.num_groups == 1 or config.switches.iar == "off" or not z_N.any()):
        logits_NC = np.round(logits_NC * 2) / 2
    if config.switches.virtual_logits == "tied":
        logits_NC[:, config.num_experts :] = logits_NC[:, -1:]
    valid = choose(["none", "some", "some", "sequence", "no token"])
    valid_N = {
        "none": None,
        "some": rng.random(N) < 0.7,
        "sequence": np.arange(N) >= 4,  # the first of two sequences is padding only
        "no token": np.zeros(N, bool),
    }[valid]
    bias_C = rng.normal(size=C).astype(np.float32) * choose([0.0, 0.3]) if config.expert_bias else None
    window = None
    if choose([False, True]):
        most = config.slots_bound + (0 if config.switches.slot_rounding == "stochastic" else 0.25)
        low = choose(_quarters(1, most))
        window = (low, choose(_quarters(low, most)))  # out of reach: refused, or clipped if traced
    sequences = choose([1, 2])
    return Problem(logits_NC.astype(np.float32), z_N.astype(np.float32), valid_N, bias_C, window, sequences, seed)


def _oracle(config: AnyExpertsConfig, p: Problem) -> dict:
    uniform_N = None
    if config.switches.slot_rounding == "stochastic":
        uniform_N = np.asarray(jax.random.uniform(jax.random.key(p.seed), (N,), np.float32))
    return route_reference(
        config,
        p.logits_NC,
        p.z_N,
        p.valid_N,
        p.bias_C,
        window=p.window,
        num_sequences=p.num_sequences,
        uniform_N=uniform_N,
    )


def _assert_equal(plan: RoutingPlan, expected: dict) -> None:
    for name in ("slots_N", "virtual_slots_N", "real_slots_N", "expert_ids_NK"):
        np.testing.assert_array_equal(getattr(plan, name), expected[name], err_msg=name)
    for name in ("importance_N", "weights_NK", "virtual_weight_N"):
        np.testing.assert_allclose(getattr(plan, name), expected[name], **FLOAT32, err_msg=name)
    for group in ("losses", "metrics"):
        actual = getattr(plan, group)
        assert actual.keys() == expected[group].keys()
        for name, value in expected[group].items():
            assert actual[name].dtype == np.float32
            np.testing.assert_allclose(actual[name], value, **FLOAT32, err_msg=name)


def _check(config: AnyExpertsConfig, p: Problem) -> None:
    plan = route(
        config,
        p.logits_NC,
        p.z_N,
        p.valid_N,
        p.bias_C,
        window=None if p.window is None else np.array(p.window, np.float32),
        num_sequences=p.num_sequences,
        key=jax.random.key(p.seed) if config.switches.slot_rounding == "stochastic" else None,
    )
    _assert_equal(plan, _oracle(config, p))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_path_equals_the_oracle_with_random_switches(shape):
    """150 examples per shape; hypothesis repeats some configurations with other tokens."""

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def check(data):
        choose = lambda of: data.draw(st.sampled_from(of))  # noqa: E731
        try:
            config = draw_config(choose, shape)
        except UserError:
            reject()
        _check(config, draw_problem(choose, config))

    check()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_path_equals_the_oracle_at_eight_hundred_configurations(shape):
    """All different, for each shape, with different tokens."""
    rng = np.random.default_rng(SHAPES.index(shape))
    choose = lambda of: of[rng.integers(len(of))]  # noqa: E731
    seen = set()
    while len(seen) < 800:
        try:
            config = draw_config(choose, shape)
        except UserError:
            continue  # switches that do not go together
        if config not in seen:
            seen.add(config)
            problem = draw_problem(choose, config)
            try:
                _check(config, problem)
            except AssertionError as error:
                error.add_note(f"{config}\n{problem}")
                raise


@pytest.mark.parametrize("seed", range(8))
def test_compiled_and_batched_path_equals_the_oracle_over_windows(seed):
    """200 windows, biases, masks and logits for each of eight compiled programs, with vmap over everything that is not
    static."""
    rng = np.random.default_rng(seed)
    E, V, K = ((6, 3, 5), (12, 4, 8))[seed % 2]
    every = ("add", "multiply_logits", "multiply_sigmoid", "off")
    config = AnyExpertsConfig(
        num_experts=E,
        num_virtual=V,
        k_min=2,
        k_max=K,
        rho_max=(0.25, 0.5)[seed // 2 % 2],
        iar=(*every, "multiply_softmax", *every[1:3], "add")[seed],
        scores="sigmoid" if seed % 4 in (1, 2) else "softmax",
        selection=("logits", "scores")[seed // 4],
        slot_rounding=("round", "stochastic", "floor")[seed % 3],
        normalisation=("all", "real", "none", "all_raw_gradient")[seed // 2],
        expert_bias=True,
        num_groups=(1, 3)[seed // 5],
        groups_kept=(1, 2)[seed // 5],
    )
    G = 200
    low_G = rng.integers(0, 4 * K, G) / 4
    window_G2 = np.stack([low_G, low_G + rng.integers(0, 20, G) / 4], axis=1).astype(np.float32)
    logits_GNC = rng.normal(size=(G, N, E + V)).astype(np.float32)
    z_GN = rng.normal(size=(G, N)).astype(np.float32)
    valid_GN = rng.random((G, N)) < 0.8
    bias_GC = 0.3 * rng.normal(size=(G, E + V)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    @jax.vmap
    def plans(logits_NC, z_N, valid_N, bias_C, window, seed):
        return route(config, logits_NC, z_N, valid_N, bias_C, window=window, key=jax.random.key(seed))

    plan = plans(logits_GNC, z_GN, valid_GN, bias_GC, window_G2, np.arange(G))
    problems = [
        Problem(logits_GNC[g], z_GN[g], valid_GN[g], bias_GC[g], (float(low), float(high)), 1, g)
        for g, (low, high) in enumerate(window_G2)
    ]
    _assert_equal(plan, jax.tree.map(lambda *values: np.stack(values), *(_oracle(config, p) for p in problems)))
