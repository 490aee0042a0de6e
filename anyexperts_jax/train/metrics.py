"""The metrics of a step: sums on the device, which add up over micro-batches and batches, and means at the end.

A record of metrics.jsonl has a step's scalars and its routing, as means over the step's valid tokens:

    loss, answer_loss, balance_loss, importance_loss, z_loss, grad_norm, learning_rate, token_accuracy, exact_match,
    tokens_per_second, goodput, time_shares            the latter by part since the process started; see train.goodput
    step_seconds                                       median, p95 and slowest since the previous record
    real_slots, virtual_share, importance              [layer][modality], null if the batch has no such token
    importance_histogram                               [layer][modality][bin], shares, over (0, 1) in equal bins
    load_max_over_mean, router_entropy, dropped        [layer]
    tokens                                             [modality]
    mean_real_slots, nominal_real_slots, mean_virtual_share, mean_importance, worst_load_max_over_mean, total_dropped
    dropped_share                                      dropped real slots as a share of all real slots
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.modality import NUM_MODALITIES
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.routing.trace import RoutingTrace

HISTOGRAM_BINS = 20


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingSums:
    """Routing summed over one or more batches; add two with `jax.tree.map(jnp.add, a, b)`."""

    tokens_M: Float[Array, "M"]
    importance_LM: Float[Array, "L M"]
    real_slots_LM: Float[Array, "L M"]
    virtual_slots_LM: Float[Array, "L M"]
    histogram: Float[Array, "L M bins"]  # tokens per bin of importance
    load_LC: Float[Array, "L C"]  # selected slots per router column
    entropy_L: Float[Array, " L"]  # nats
    dropped_L: Float[Array, " L"]


def routing_sums(trace: RoutingTrace, batch: Batch) -> RoutingSums:
    """Sums over a batch's valid tokens, by layer and modality, in float32: counts are exact below 2^24."""
    modality_BT, valid_BT = jnp.asarray(batch.modality_BT), jnp.asarray(batch.valid_BT)
    is_in_BTM = jax.nn.one_hot(modality_BT, NUM_MODALITIES) * valid_BT[..., None].astype(jnp.float32)
    importance_LBT = jax.lax.stop_gradient(trace.importance_BT)
    bin_LBT = jnp.clip(importance_LBT * HISTOGRAM_BINS, 0, HISTOGRAM_BINS - 1).astype(jnp.int32)

    def by_modality(values_LBT: Array) -> Float[Array, "L M"]:
        return jnp.einsum("lbt,btm->lm", values_LBT.astype(jnp.float32), is_in_BTM)

    return RoutingSums(
        tokens_M=is_in_BTM.sum((0, 1)),
        importance_LM=by_modality(importance_LBT),
        real_slots_LM=by_modality(trace.real_slots_BT),
        virtual_slots_LM=by_modality(trace.virtual_slots_BT),
        histogram=jnp.einsum("lbtx,btm->lmx", jax.nn.one_hot(bin_LBT, HISTOGRAM_BINS), is_in_BTM),
        load_LC=trace.metrics["load_C"],
        entropy_L=trace.metrics["router_entropy"] * valid_BT.sum(dtype=jnp.float32),
        dropped_L=trace.metrics["dropped"],
    )


def routing_means(config: AnyExpertsConfig, sums: RoutingSums) -> dict[str, Any]:
    """The routing part of a record from sums on the host: NumPy arrays, with NaN for a modality without tokens."""
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    tokens = max(float(sums.tokens_M.sum()), 1.0)
    layers = max(len(sums.real_slots_LM), 1)  # a dense model has no MoE layer, and its means are 0
    per_token_M = 1 / np.where(sums.tokens_M > 0, sums.tokens_M, np.nan)
    slots_LM = sums.real_slots_LM + sums.virtual_slots_LM
    real_load_LE = sums.load_LC[:, : config.num_experts]
    peak_L = real_load_LE.max(1) / np.maximum(real_load_LE.mean(1), 1 / config.num_experts)
    return {
        "tokens": sums.tokens_M,
        "real_slots": sums.real_slots_LM * per_token_M,
        "virtual_share": sums.virtual_slots_LM / np.where(slots_LM > 0, slots_LM, np.nan),
        "importance": sums.importance_LM * per_token_M,
        "importance_histogram": sums.histogram * per_token_M[:, None],
        "load_max_over_mean": peak_L,
        "router_entropy": sums.entropy_L / tokens,
        "dropped": sums.dropped_L,
        "mean_real_slots": float(sums.real_slots_LM.sum()) / layers / tokens,
        "nominal_real_slots": float(config.expected_real_slots) if len(peak_L) else 0.0,
        "mean_virtual_share": float(sums.virtual_slots_LM.sum()) / max(float(slots_LM.sum()), 1.0),
        "mean_importance": float(sums.importance_LM.sum()) / layers / tokens,
        "worst_load_max_over_mean": float(peak_L.max(initial=0.0)),
        "total_dropped": float(sums.dropped_L.sum()),
        "dropped_share": float(sums.dropped_L.sum()) / max(float(sums.real_slots_LM.sum()), 1.0),
    }


def plain(value: Any) -> Any:
    """Converts a value for JSON: to lists and numbers, with None for NaN and infinities."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
