"""Runs a model over batches at a window, and collects its routing on the host."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.modality import MODALITY_NAMES, NUM_MODALITIES
from anyexperts_jax.evaluate.importance import Separation, baseline_scores, candidates, separations
from anyexperts_jax.evaluate.results import RoutingSummary
from anyexperts_jax.evaluate.trained import Trained, at_window
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput, MultimodalModel
from anyexperts_jax.sharding.placement import Placement, placement_of

Window = tuple[float, float]
Batches = Mapping[str, Sequence[Batch]]  # by domain


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingSample:
    """The routing of every token of B sequences, from several batches."""

    importance_LBT: Float[ndarray, "L B T"]
    real_LBT: Int[ndarray, "L B T"]
    virtual_LBT: Int[ndarray, "L B T"]
    entropy_LBT: Float[ndarray, "L B T"]  # nats, of the router's scores
    load_LME: Int[ndarray, "L M E"]
    dropped: int
    modality_BT: Int[ndarray, "B T"]
    valid_BT: Bool[ndarray, "B T"]
    domain_B: tuple[str, ...]


def run_at(trained: Trained, model: ModelConfig, batch: Batch, window: Window) -> ModelOutput:
    """Runs the trained model on a batch of `trained.whole_rows`; `model` is the run's, with room for the window."""
    model = at_window(model, window)
    return forward(model, trained.params, trained.router_bias_LC, trained.place(batch), window_array(window))


def forward(config: ModelConfig, params: Any, router_bias_LC: Array, batch: Batch, window: Array) -> ModelOutput:
    """Runs the model on a batch. It is compiled once per configuration, for all windows.

    The size of dispatch's buffers follows the configuration's budget, not the window's: see `trained.at_window`.
    """
    return _forward((config, placement_of(params)), params, router_bias_LC, batch, window)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    static: tuple[ModelConfig, Placement], params: Any, router_bias_LC: Array, batch: Batch, window: Array
) -> ModelOutput:
    apply = MultimodalModel(*static).apply
    output: Any = apply({"params": params}, batch, router_bias_LC=router_bias_LC, window=window)
    return output


def window_array(window: Window) -> Float[Array, "2"]:
    """Returns a window as the model takes it."""
    return jnp.asarray(window, jnp.float32)


def sample_routing(
    trained: Trained,
    model: ModelConfig,
    batches: Batches,
    window: Window,
    see: Callable[[str, Batch, ModelOutput], None] = lambda domain, batch, output: None,
) -> RoutingSample:
    """Samples the teacher-forced routing of all batches at `window`; `model` is the run's, with room for the window.

    Args:
      see: called with every batch's domain, the batch, and the model's output for it.
    """
    E = model.moe.num_experts
    parts, domain_B = [], []
    load_LME: Any = 0
    dropped = 0.0
    for domain, of_domain in batches.items():
        for batch in of_domain:
            output = run_at(trained, model, batch, window)
            see(domain, batch, output)
            trace = jax.device_get(output.trace)
            load_LME = load_LME + load_by_modality(trace.expert_ids_BTK, np.asarray(batch.modality_BT), E)
            dropped += float(trace.metrics["dropped"].sum())
            entropy_LBT = trace.metrics["router_entropy_N"].reshape(trace.importance_BT.shape)
            parts.append((trace.importance_BT, trace.real_slots_BT, trace.virtual_slots_BT, entropy_LBT))
            domain_B += [domain] * len(batch.tokens_BT)
    importance_LBT, real_LBT, virtual_LBT, entropy_LBT = (
        np.concatenate(part, axis=1) for part in zip(*parts, strict=True)
    )
    every = [batch for of_domain in batches.values() for batch in of_domain]
    return RoutingSample(
        importance_LBT=importance_LBT,
        real_LBT=real_LBT,
        virtual_LBT=virtual_LBT,
        entropy_LBT=entropy_LBT,
        load_LME=load_LME,
        dropped=round(dropped),
        modality_BT=np.concatenate([np.asarray(batch.modality_BT) for batch in every]),
        valid_BT=np.concatenate([np.asarray(batch.valid_BT) for batch in every]),
        domain_B=tuple(domain_B),
    )


def load_by_modality(expert_ids_LBTK: ndarray, modality_BT: ndarray, num_experts: int) -> Int[ndarray, "L M E"]:
    """Counts the slots each real expert got from each modality. Empty slots have id E, so padding adds nothing."""
    L = len(expert_ids_LBTK)
    cell_LBTK = modality_BT[None, :, :, None] * (num_experts + 1) + expert_ids_LBTK
    counts = [np.bincount(cell.ravel(), minlength=NUM_MODALITIES * (num_experts + 1)) for cell in cell_LBTK]
    return np.stack(counts).reshape(L, NUM_MODALITIES, num_experts + 1)[:, :, :num_experts]


def mean_real_slots(trained: Trained, model: ModelConfig, batches: Batches, window: Window) -> float:
    """Measures the realised budget: real slots per valid token and MoE layer."""
    sample = sample_routing(trained, model, batches, window)
    return float(sample.real_LBT[:, sample.valid_BT].mean())


def summarise(sample: RoutingSample, moe: AnyExpertsConfig, window: Window) -> RoutingSummary:
    """Averages a sample by layer, modality and domain."""
    real_LN, virtual_LN = sample.real_LBT[:, sample.valid_BT], sample.virtual_LBT[:, sample.valid_BT]
    importance_LN = sample.importance_LBT[:, sample.valid_BT]
    modality_N = sample.modality_BT[sample.valid_BT]
    domain_N = np.repeat(np.array(sample.domain_B), sample.valid_BT.sum(axis=1))
    share_LN = virtual_LN / np.maximum(real_LN + virtual_LN, 1)
    load_LE = sample.load_LME.sum(axis=1)
    real_LM, slots_LM = _by_modality(real_LN, modality_N), _by_modality(real_LN + virtual_LN, modality_N)
    real_M = _by_modality(real_LN.mean(axis=0, keepdims=True), modality_N)[0]
    return RoutingSummary(
        window=(float(window[0]), float(window[1])),
        tokens=len(modality_N),
        real_slots=float(real_LN.mean()),
        real_slots_by_domain={name: float(real_LN[:, domain_N == name].mean()) for name in _ordered(sample.domain_B)},
        real_slots_by_modality={
            MODALITY_NAMES[m]: float(real_M[m]) for m in range(NUM_MODALITIES) if (modality_N == m).any()
        },
        real_slots_by_layer=_nested(real_LN.mean(axis=1)),
        real_slots_LM=_nested(real_LM),
        importance_LM=_nested(_by_modality(importance_LN, modality_N)) if moe.uses_importance else (),
        virtual_share_LM=_nested(_by_modality(virtual_LN, modality_N) / slots_LM),
        virtual_share=float(virtual_LN.sum() / max((real_LN + virtual_LN).sum(), 1)),
        largest_virtual_share=float(share_LN.max()),
        load_LME=_nested(sample.load_LME),
        load_max_over_mean=_nested(load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)),
        dropped=sample.dropped,
    )


def measure_separations(
    sample: RoutingSample,
    batches: Batches,
    moe: AnyExpertsConfig,
    more: Mapping[str, Float[ndarray, "B T"]] | None = None,
) -> tuple[Separation, ...]:
    """Compares importance with the evidence in the sample's batches; () if importance is not used.

    Args:
      more: further scores to compare with, by name.
    """
    if not moe.uses_importance:
        return ()
    every = [batch for of_domain in batches.values() for batch in of_domain]
    baselines = [baseline_scores(batch, seed) for seed, batch in enumerate(every)]
    scores = {name: np.concatenate([found[name] for found in baselines]) for name in baselines[0]}
    return separations(
        sample.importance_LBT,
        np.concatenate([candidates(batch) for batch in every]),
        np.concatenate([np.asarray(batch.evidence_BT) for batch in every]),
        sample.modality_BT,
        {**scores, **(more or {})},
    )


def _by_modality(values_LN: ndarray, modality_N: Int[ndarray, " N"]) -> Float[ndarray, "L M"]:
    """Returns the mean over each modality's tokens; NaN if there are none."""
    counts_M = np.bincount(modality_N, minlength=NUM_MODALITIES)
    sums_LM = np.stack([np.bincount(modality_N, row, NUM_MODALITIES) for row in values_LN])
    return sums_LM / np.where(counts_M > 0, counts_M, np.nan)


def _ordered(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _nested(values: ndarray) -> Any:
    """Converts an array to nested tuples of plain numbers."""
    return tuple(_nested(row) for row in values) if values.ndim > 1 else tuple(values.tolist())
