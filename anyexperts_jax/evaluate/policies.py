"""Measures a pretrained model's perplexity on a text, at any budget with any policy, and the experts it really used."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.registries import POLICIES
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.evaluate.dials import SEARCH_STEPS, Inputs, apply, find_dial, seen_by
from anyexperts_jax.evaluate.modes import calibrate_on
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.split import merge
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.routing.policies import IMPORTANCE, Seen
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.losses import next_token_nats

# Further policies that can be measured; "dense" is the model before `split`.
OWN, DENSE, LAYERS, MODES, ORACLE = "own", "dense", "static_layers", "modes", "oracle"


@dataclasses.dataclass(frozen=True)
class TextSample:
    """Rows of ids, and the number of bytes of the text that is predicted in them."""

    tokens_BT: Int[np.ndarray, "B T"]
    text_bytes: int


class Measured(NamedTuple):
    """The result of one pass over the sample."""

    policy: str
    budget: float  # as requested, experts per token; nan for the dense model
    realised: float  # real experts per token and layer; nan for the dense model
    nats: float  # per predicted token
    bits_per_byte: float
    seconds: float
    unique: float  # distinct experts that a batch uses in a layer, on average


def text_sample(m: Pretrained, text: str, tokens: int, length: int) -> TextSample:
    """Takes the first `tokens` ids of a text, in rows of `length`; a row's first id is not predicted.

    Raises:
      UserError: if the text has fewer than two tokens.
    """
    ids = np.asarray(m.tokenizer.encode(text[: 16 * tokens]).ids_T)[:tokens]
    length = min(length, m.config.max_length, len(ids))
    require(length >= 2, "the text has fewer than two tokens; nothing is predicted in it")
    rows = len(ids) // length
    tokens_BT = ids[: rows * length].reshape(rows, length)
    text_bytes = sum(len(m.tokenizer.decode(row[1:].tolist()).encode()) for row in tokens_BT)
    return TextSample(tokens_BT, text_bytes)


def policy_names(m: Pretrained) -> tuple[str, ...]:
    """Lists the policies a model can run: those based on router scores, or importance if it has variable slots."""
    dense = (DENSE,) if m.order_LF is not None else ()
    if m.config.moe.uses_importance or m.config.moe.num_virtual:
        return (*dense, IMPORTANCE)
    return (*dense, *POLICIES.names(), LAYERS, MODES, ORACLE)


def _depends_on_modality(name: str) -> bool:
    return name in POLICIES and bool(POLICIES[name].by_modality)


def measure_policies(
    m: Pretrained,
    sample: TextSample,
    budgets: Sequence[float],
    policies: Sequence[str] = (),
    *,
    batch_rows: int = 4,
    note: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Measures the unchanged model, then each policy at each budget.

    A policy's dial is set on the router scores of the unchanged model, so that tokens get the budget on average. The
    number that they really get is then measured. "static_layers" gives each layer a whole number: the next expert goes
    to the layer where it adds the most router score. "modes" is `evaluate.modes`, calibrated on the first batch.
    "oracle" chooses a whole number for every position in hindsight, from those around the budgets, half of the
    smallest, and the model's own, by the loss that the position had when the whole sequence ran at that number. No
    policy that chooses among these runs does better at this budget or below. "dense" is a split model before the split;
    it is measured once, first.

    Args:
      budgets: experts per token.
      policies: names; (): all that fit the model and do not depend on modality, since the sample is text.
      batch_rows: rows per batch.
      note: called with a line for each pass.

    Raises:
      UserError: if the model is dense, a policy does not fit it, or it cannot reach a budget.
    """
    check_asked(m, budgets, policies, policy_names(m))
    names = policies or [name for name in policy_names(m) if not _depends_on_modality(name)]
    bench = TextBench(m, sample, batch_rows)
    found = [TextBench(merge(m), sample, batch_rows).measure_unchanged(DENSE)] if DENSE in names else []
    found.append(bench.measure_unchanged(OWN))
    for one in found:
        note(_line(one))
    around = {k for budget in budgets for k in (math.floor(budget), math.ceil(budget))}
    least = max(1, math.floor(min(budgets, default=1) / 2))
    whole = sorted({*around, least, round(m.config.moe.expected_real_slots)})
    for name in names:
        for budget in budgets if name != DENSE else ():
            found.append(_one(bench, name, budget, whole))
            note(_line(found[-1]))
    return found


def check_asked(m: Pretrained, budgets: Sequence[float], policies: Sequence[str], valid: Sequence[str]) -> None:
    """Refuses what a model cannot be measured at.

    Raises:
      UserError: a dense model, a policy that is not `valid`, or a budget out of reach.
    """
    require(m.config.stack.num_moe_layers > 0, "the model is dense and has no experts to choose; split it first")
    for name in policies:
        require_one_of("policy", name, valid)
    most = m.config.moe.experts_in_reach
    for budget in budgets:
        require(1 <= budget <= most, f"budget={budget:g} must be from 1 to {most} experts a token")


def perplexity(one: Measured) -> float:
    """Returns the perplexity per predicted token, capped to stay finite."""
    return perplexity_of(one.nats)


def perplexity_of(nats: float) -> float:
    """Returns the perplexity of a loss in nats per token, capped to stay finite."""
    return math.exp(min(nats, 700))


def table(found: Sequence[Measured], where: str, *, seconds: bool = True) -> TextTable:
    """Returns a table with a row for each pass. "time" is its seconds over those of the first row.

    Args:
      seconds: whether to add the column of seconds.
    """
    columns = ["policy", "budget", "experts a token", "perplexity", "bits per byte", "time", "unique experts"]
    if seconds:
        columns.append("seconds")
    rows = []
    for one in found:
        row = [one.policy, _or_dash(one.budget, "g"), _or_dash(one.realised, ".3f"), f"{perplexity(one):.4f}"]
        row += [f"{one.bits_per_byte:.4f}", f"{one.seconds / found[0].seconds:.2f}", _or_dash(one.unique, ".1f")]
        rows.append(tuple([*row, f"{one.seconds:.2f}"] if seconds else row))
    return TextTable(where, tuple(columns), tuple(rows))


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _line(one: Measured) -> str:
    budget = "" if math.isnan(one.budget) else f" at {one.budget:g}"
    return f"{one.policy}{budget}: perplexity {perplexity(one):.4g}, {one.seconds:.1f} s"


class Pass(NamedTuple):
    """The result of one pass with one window."""

    nats_BT: np.ndarray  # of each predicted token
    realised: float
    unique: float
    seconds: float


class TextBench:
    """A model and a sample, cut into batches of one shape.

    Args:
      batch_rows: rows per batch; rows that do not fill one are left out.
    """

    def __init__(self, m: Pretrained, sample: TextSample, batch_rows: int) -> None:
        self.m, self.sample = m, sample
        rows = min(batch_rows, len(sample.tokens_BT))
        count = len(sample.tokens_BT) // rows
        self._batches = [jnp.asarray(part, jnp.int32) for part in np.split(sample.tokens_BT[: count * rows], count)]
        self._known: dict[int, Pass] = {}
        self._compiled: set[tuple[ModelConfig, Any]] = set()

    @property
    def first(self) -> Int[Array, "B T"]:
        """The batch on which dials are set."""
        return self._batches[0]

    @functools.cached_property
    def seen(self) -> Seen:
        """Router logits and scores [L, N, E] of the first batch under the model's own policy."""
        return seen_by(self.m, Inputs(self.first))

    def run(self, config: ModelConfig, window: Float[Array, "*rest 2"] | None) -> Pass:
        """Runs one pass over the sample. The first one of a program is preceded by an untimed batch, to compile it."""
        arguments = ((config, self.m.placement), self.m.params, self.m.router_bias_LC)
        program = (config, None if window is None else window.shape)
        if program not in self._compiled:
            jax.block_until_ready(_run(*arguments, self._batches[0], window))
            self._compiled.add(program)
        began = time.perf_counter()
        results = [jax.block_until_ready(_run(*arguments, batch, window)) for batch in self._batches]
        seconds = time.perf_counter() - began
        nats, realised, unique = zip(*results, strict=True)
        means = (float(np.mean([float(one) for one in part])) for part in (realised, unique))
        return Pass(np.concatenate([np.asarray(one) for one in nats]), *means, seconds=seconds)

    def at(self, slots: int) -> Pass:
        """Runs a pass with the same number of experts for all tokens, or returns the earlier one."""
        if slots not in self._known:
            self._known[slots] = self.run(_config_of(self.m, "static"), jnp.asarray((slots, slots), jnp.float32))
        return self._known[slots]

    def measure_unchanged(self, policy: str) -> Measured:
        """Measures the unchanged model."""
        dense = self.m.config.stack.num_moe_layers == 0
        budget = math.nan if dense else self.m.config.moe.expected_real_slots
        return self.measured(policy, budget, self.run(self.m.config, None))

    def measured(self, policy: str, budget: float, one: Pass) -> Measured:
        nats = float(one.nats_BT.mean())
        scored = one.nats_BT.size / (len(self.sample.tokens_BT) * (self.sample.tokens_BT.shape[1] - 1))
        bits = float(one.nats_BT.sum()) / math.log(2) / max(self.sample.text_bytes * scored, 1)
        return Measured(
            policy, budget, one.realised, nats=nats, bits_per_byte=bits, seconds=one.seconds, unique=one.unique
        )


def _one(bench: TextBench, name: str, budget: float, whole: Sequence[int]) -> Measured:
    if name == ORACLE:
        return bench.measured(name, budget, _oracle({k: bench.at(k) for k in whole}, budget))
    first = Inputs(bench.first)
    own = policy_at(bench.m, name, budget, first, lambda: bench.seen)
    return bench.measured(name, budget, bench.run(own.config, own.window_of(first)))


class PolicyAt(NamedTuple):
    """A policy with its dial set for a budget."""

    config: ModelConfig
    window_of: Callable[[Inputs], Float[Array, "*rest 2"] | None]  # of a batch


def policy_at(m: Pretrained, name: str, budget: float, first: Inputs, seen: Callable[[], Seen]) -> PolicyAt:
    """An entry of POLICIES, "static_layers", "modes" or "importance", which gives the tokens of `first` the budget.

    Args:
      seen: gives what `seen_by` tells of `first`, where the policy needs it.
    """
    if name == IMPORTANCE:
        moe = shift_budget(m.config.moe, budget)
        return PolicyAt(dataclasses.replace(m.config, moe=moe), lambda _: None)
    if name == MODES:
        modes = calibrate_on(m, first, budget)
        return PolicyAt(modes.config(m.config), lambda batch: modes.window(batch.modality_BT))
    if name == LAYERS:
        slots_L = slots_of_layers(np.asarray(seen().scores_NE, np.float32), budget)
        window_L2 = jnp.stack([jnp.asarray(slots_L, jnp.float32)] * 2, axis=1)
        return PolicyAt(_config_of(m, "static"), lambda _: window_L2)
    most = m.config.moe.experts_in_reach
    window_2 = jnp.asarray((find_dial(name, seen(), budget, most), most), jnp.float32)
    return PolicyAt(_config_of(m, name), lambda _: window_2)


def _config_of(m: Pretrained, policy: str) -> ModelConfig:
    """The model's configuration under an entry of POLICIES, with room for any number of experts."""
    most = m.config.moe.experts_in_reach
    return dataclasses.replace(m.config, moe=dataclasses.replace(m.config.moe, k_min=most, k_max=most, policy=policy))


def slots_of_layers(scores_LNE: Float[np.ndarray, "L N E"], budget: float) -> Int[np.ndarray, "L"]:
    """Chooses a whole number of experts per layer, `budget` on average, adding each where it gains the most score."""
    gains_LE: np.ndarray = -np.sort(-scores_LNE, axis=-1).mean(axis=1)
    layers, experts = gains_LE.shape
    slots_L = np.ones(layers, int)
    for _ in range(round(budget * layers) - layers):
        open_L = np.where(slots_L < experts, gains_LE[np.arange(layers), np.minimum(slots_L, experts - 1)], -1.0)
        slots_L[int(np.argmax(open_L))] += 1
    return slots_L


def _oracle(passes: dict[int, Pass], budget: float) -> Pass:
    """Minimises the summed loss with at most `budget` experts per position on average, by a price per expert."""
    slots_K = np.array(sorted(passes))
    nats_KBT = np.stack([passes[k].nats_BT for k in slots_K.tolist()])
    low, high = 0.0, 1e3
    for _ in range(SEARCH_STEPS):
        price = (low + high) / 2
        chosen_BT = (nats_KBT + price * slots_K[:, None, None]).argmin(axis=0)
        low, high = (low, price) if slots_K[chosen_BT].mean() <= budget else (price, high)
    chosen_BT = (nats_KBT + high * slots_K[:, None, None]).argmin(axis=0)
    nats_BT = np.take_along_axis(nats_KBT, chosen_BT[None], axis=0)[0]
    seconds = sum(one.seconds for one in passes.values())
    return Pass(nats_BT, float(slots_K[chosen_BT].mean()), float("nan"), seconds)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    static: tuple[ModelConfig, Placement],
    params: Any,
    bias_LC: Array | None,
    tokens_BT: Int[Array, "B T"],
    window: Float[Array, "*rest 2"] | None,
) -> tuple[Array, Array, Array]:
    output = apply(static, params, bias_LC, Inputs(tokens_BT), window=window)
    assert isinstance(output, ModelOutput)
    nats_BT = next_token_nats(output.logits_BTY, tokens_BT)[:, :-1]
    if not static[0].stack.num_moe_layers:
        return nats_BT, jnp.float32(jnp.nan), jnp.float32(jnp.nan)
    ids_LBTK = output.trace.expert_ids_BTK
    experts = static[0].moe.num_experts
    hit_LE = jax.vmap(lambda ids: jnp.zeros(experts, bool).at[ids.ravel()].set(True, mode="drop"))(ids_LBTK)
    return nats_BT, output.trace.real_slots_BT.astype(jnp.float32).mean(), hit_LE.sum(axis=1).astype(jnp.float32).mean()
