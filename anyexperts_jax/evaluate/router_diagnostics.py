"""EvoMoE's diagnostics of a trained MoE model: whether its experts differ, and whether its router knows modalities.

Expert uniformity: if experts are alike, permuting a token's logits among them costs nothing.
Router rigidity: if logits have the same distribution for two modalities, the router does not tell them apart.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from numpy import ndarray

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.modality import NUM_MODALITIES
from anyexperts_jax.evaluate.measure import Batches, load_by_modality
from anyexperts_jax.evaluate.trained import Trained
from anyexperts_jax.evolution.single_expert import expert_similarity
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import moe_probe
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.losses import answer_scores

BINS = 40


@dataclasses.dataclass(frozen=True, eq=False)
class RouterDiagnostics:
    """The results of `diagnose`; M modalities, NaN for a modality without tokens."""

    loss: float  # nats per answer token
    shuffled_losses: tuple[float, ...]  # the same with each token's logits permuted among experts, one per shuffle
    edges_X: Float[ndarray, "edges"]  # bin edges, in nats: a logit minus the mean of its token's real logits
    density_LMEX: Float[ndarray, "L M E bins"]  # shares of each modality's tokens by bin
    overlap_MM: Float[ndarray, "M M"]  # of densities, mean over layers and experts: 1 alike, 0 apart
    distance_EE: Float[ndarray, "E E"]  # between experts' weights, over the norm of expert 1's
    cosine_EE: Float[ndarray, "E E"]
    share_LME: Float[ndarray, "L M E"]  # of a modality's real slots that went to each expert

    @property
    def shuffle_cost(self) -> float:
        """The rise in loss caused by shuffling, averaged over shuffles, in nats per answer token."""
        return float(np.mean(self.shuffled_losses)) - self.loss


def diagnose(trained: Trained, batches: Batches, *, shuffles: int = 3, seed: int = 0) -> RouterDiagnostics:
    """Runs the model over all batches, once unchanged and `shuffles` times with permuted logits."""
    config = trained.config.model
    every = [batch for of_domain in batches.values() for batch in of_domain]
    arguments = (config, trained.placement, trained.params, trained.router_bias_LC)
    probes = [jax.device_get(_probe(*arguments, trained.place(batch))) for batch in every]
    answered = max(sum(float(tokens) for _, tokens, _, _ in probes), 1.0)
    loss = sum(float(nats) for nats, _, _, _ in probes) / answered
    shuffled = []
    for index in range(shuffles):
        key = jax.random.fold_in(jax.random.key(seed), index)
        nats = (
            _shuffled_nats(*arguments, trained.place(batch), jax.random.fold_in(key, b))
            for b, batch in enumerate(every)
        )
        shuffled.append(sum(map(float, nats)) / answered)
    E = config.moe.num_experts
    load_LME = np.sum(
        [load_by_modality(ids, np.asarray(b.modality_BT), E) for (*_, ids), b in zip(probes, every, strict=True)],
        axis=0,
    )
    edges_X, density_LMEX = logit_densities([logits[..., :E] for _, _, logits, _ in probes], every)
    distance_EE, cosine_EE = expert_similarity(config, trained.params)
    slots_LM1 = load_LME.sum(2, keepdims=True)
    return RouterDiagnostics(
        loss=loss,
        shuffled_losses=tuple(shuffled),
        edges_X=edges_X,
        density_LMEX=density_LMEX,
        overlap_MM=density_overlap(density_LMEX),
        distance_EE=distance_EE,
        cosine_EE=cosine_EE,
        share_LME=load_LME / np.where(slots_LM1 > 0, slots_LM1, np.nan),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe(
    config: ModelConfig, placement: Placement, params: Any, router_bias_LC: Array, batch: Batch
) -> tuple[Array, Array, Array, Array]:
    """Returns summed nats, number of answer tokens, logits [L, B, T, C] and selected experts [L, B, T, K]."""
    model = MultimodalModel(config, placement)
    output, probed = model.apply({"params": params}, batch, router_bias_LC=router_bias_LC, mutable=["probe"])
    scores = answer_scores(output.logits_BTY, batch.tokens_BT, batch.loss_mask_BT)
    logits_LBTC = moe_probe(probed)["logits_BTC"]
    return scores.loss_B.sum(), scores.tokens_B.sum(), logits_LBTC, output.trace.expert_ids_BTK


@functools.partial(jax.jit, static_argnums=(0, 1))
def _shuffled_nats(
    config: ModelConfig, placement: Placement, params: Any, router_bias_LC: Array, batch: Batch, key: Array
) -> Array:
    apply = MultimodalModel(config, placement).apply
    output: Any = apply({"params": params}, batch, router_bias_LC=router_bias_LC, rngs={"shuffle": key})
    return answer_scores(output.logits_BTY, batch.tokens_BT, batch.loss_mask_BT).loss_B.sum()


def logit_densities(
    logits_LBTE: list[Float[ndarray, "L _ T E"]], batches: list[Batch]
) -> tuple[Float[ndarray, "edges"], Float[ndarray, "L M E bins"]]:
    """Returns bin edges, and by layer and expert the share of each modality's valid tokens in each bin.

    The mean of a token's logits is subtracted, since it does not affect routing. NaN without tokens.
    """
    tokens = [np.asarray(batch.valid_BT) for batch in batches]
    logits_LNE = np.concatenate([x[:, kept] for x, kept in zip(logits_LBTE, tokens, strict=True)], axis=1)
    logits_LNE = logits_LNE - logits_LNE.mean(-1, keepdims=True)
    modality_N = np.concatenate([np.asarray(b.modality_BT)[kept] for b, kept in zip(batches, tokens, strict=True)])
    reach = max(float(np.abs(logits_LNE).max(initial=0.0)), 1e-6)
    edges_X = np.linspace(-reach, reach, BINS + 1)
    layers, _, experts = logits_LNE.shape
    density_LMEX = np.full((layers, NUM_MODALITIES, experts, BINS), np.nan)
    for m in np.unique(modality_N):
        of_m = logits_LNE[:, modality_N == m]
        for layer in range(layers):
            for expert in range(experts):
                counts_X, _ = np.histogram(of_m[layer, :, expert], edges_X)
                density_LMEX[layer, m, expert] = counts_X / of_m.shape[1]
    return edges_X, density_LMEX


def density_overlap(density_LMEX: Float[ndarray, "L M E bins"]) -> Float[ndarray, "M M"]:
    """Returns the overlap of modalities' densities: the minimum summed over bins, mean over layers and experts."""
    lesser = np.minimum(density_LMEX[:, :, None], density_LMEX[:, None])  # NaN if either is
    return lesser.sum(-1).mean((0, 3))
