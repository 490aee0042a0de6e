"""MoDES (arXiv 2511.15690): skips experts whose score, times their layer's importance, is below a threshold.

A layer's importance is the divergence between the model's predictions with and without the layer's routed experts,
measured once on some text and pictures. Text tokens and all others have separate thresholds. The pairs of thresholds
that give the budget lie on a curve: the more experts text gets, the fewer the other tokens get. Some points of the
curve are tried, and the one at which the predictions diverge least is used.

Our readings: a token keeps at least its best expert, and the weights of the experts it keeps follow the model's own
rule, as at any budget. With text only there is one threshold, and nothing to choose.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.evaluate.dials import Inputs, Static, apply, find_dial, inputs_of, seen_by
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import named_leaves, params_of_leaves
from anyexperts_jax.models.multimodal import ModelOutput
from anyexperts_jax.models.paths import EXPERTS_DOWN
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.routing.losses import masked_mean
from anyexperts_jax.routing.policies import Seen

_POLICY = "threshold"  # its dial, per layer and token, is the threshold divided by the layer's importance
_NEVER = 2.0  # a dial that no score reaches


@dataclasses.dataclass(frozen=True, eq=False)
class Modes:
    """The result of a calibration."""

    importance_L: Float[np.ndarray, "L"]  # divergence without the layer's experts, divided by the largest
    text: float  # threshold of text
    other: float  # threshold of pictures, videos and sounds
    most: int  # largest number of experts per token

    def window(self, modality_BT: Int[Array, "B T"]) -> Float[Array, "L B T 2"]:
        """Returns (dial, most) for every layer and token, for a model with the policy "threshold"."""
        threshold_BT = jnp.where(modality_BT == Modality.TEXT, self.text, self.other)
        importance_L = jnp.maximum(jnp.asarray(self.importance_L, jnp.float32), 1e-9)
        dial_LBT = jnp.minimum(threshold_BT[None] / importance_L[:, None, None], _NEVER)
        return jnp.stack([dial_LBT, jnp.full_like(dial_LBT, self.most)], axis=-1)

    def config(self, config: ModelConfig) -> ModelConfig:
        """Returns the model's configuration with room for the windows."""
        moe = dataclasses.replace(config.moe, k_min=self.most, k_max=self.most, policy=_POLICY)
        return dataclasses.replace(config, moe=moe)

    def forward(
        self,
        m: Pretrained,
        tokens_BT: Any,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
    ) -> ModelOutput:
        """Runs `m.forward` with these thresholds."""
        inputs = inputs_of(m, tokens_BT, images=images, videos=videos, audios=audios)
        return _output(m, self.config(m.config), inputs, self.window(inputs.modality_BT))


def calibrate(
    m: Pretrained,
    tokens_BT: Any,
    budget: float,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    points: int = 9,
) -> Modes:
    """Measures the importance of layers, and finds thresholds at which tokens get `budget` experts on average.

    It needs a forward pass for each MoE layer, memory for a second copy of the experts' down matrices, and with media a
    pass for each point.

    Args:
      tokens_BT: ids, without padding.
      images, videos, audios: those that the tokens have placeholders for, as for `m.forward`.
      points: how many points of the curve of thresholds are tried, if there are tokens besides text.

    Raises:
      UserError: if the model is dense or has variable slots, or cannot reach the budget.
    """
    return calibrate_on(m, inputs_of(m, tokens_BT, images=images, videos=videos, audios=audios), budget, points)


def calibrate_on(m: Pretrained, inputs: Inputs, budget: float, points: int = 9) -> Modes:
    """`calibrate` on inputs that have been read."""
    moe = m.config.moe
    require(m.config.stack.num_moe_layers > 0, "MoDES: the model is dense and has no experts to choose")
    require(not moe.uses_importance and not moe.num_virtual, "MoDES: the model has slots of its own")
    require(1 <= budget <= moe.experts_in_reach, f"MoDES: budget={budget:g} must be from 1 to {moe.experts_in_reach}")
    require(points >= 2, f"MoDES: points={points} must be >= 2")
    most = max(int(moe.k_max), math.ceil(budget))  # a budget above the model's own number adds experts before skipping
    seen, logs_BTY = seen_by(m, inputs), _log_probs(m, m.config, inputs, None)
    importance_L = layer_importance(m, inputs, logs_BTY)
    weighed = seen._replace(scores_NE=seen.scores_NE * jnp.asarray(importance_L)[:, None, None])
    found = [Modes(importance_L, text, other, most) for text, other in thresholds(weighed, budget, most, points)]
    if len(found) == 1:
        return found[0]

    def lost(one: Modes) -> float:
        others_BTY = _log_probs(m, one.config(m.config), inputs, one.window(inputs.modality_BT))
        return divergence(logs_BTY, others_BTY, inputs.valid_BT)

    return min(found, key=lost)


def layer_importance(m: Pretrained, inputs: Inputs, logs_BTY: Float[Array, "B T Y"]) -> Float[np.ndarray, "L"]:
    """Measures the divergence of the predictions without each layer's routed experts, divided by the largest."""
    layers = m.config.stack.num_moe_layers
    arguments = ((m.config, m.placement), m.params, m.router_bias_LC, (inputs, logs_BTY))
    lost_L = [max(float(_lost_without(*arguments, jnp.int32(layer))), 0.0) for layer in range(layers)]
    return np.asarray(lost_L, np.float32) / max(*lost_L, 1e-30)


def thresholds(weighed: Seen, budget: float, most: int, points: int) -> list[tuple[float, float]]:
    """Returns pairs of thresholds, for text and for other tokens, that give the budget on average.

    Args:
      weighed: scores times importance, [L, N, E], with modalities.
    """
    assert weighed.modality_N is not None
    text_N = np.asarray(weighed.modality_N[0]) == Modality.TEXT

    def of(chosen_N: np.ndarray, mean: float) -> float:
        own = jax.tree.map(lambda part: part[:, chosen_N], weighed)
        return find_dial(_POLICY, own, mean, most)

    if text_N.all() or not text_N.any():
        only = of(np.ones_like(text_N), budget)
        return [(only, only)]
    share, found = float(text_N.mean()), []
    # At the low end of text's mean the other tokens get their maximum, at the high end they get one expert.
    low, high = ((budget - (1 - share) * rest) / share for rest in (most, 1))
    for text_mean in np.linspace(max(low, 1), min(high, most), points).tolist():
        other_mean = (budget - share * text_mean) / (1 - share)
        found.append((of(text_N, text_mean), of(~text_N, other_mean)))
    return found


def divergence(
    logs_BTY: Float[Array, "B T Y"], others_BTY: Float[Array, "B T Y"], valid_BT: Bool[Array, "B T"] | None = None
) -> float:
    """Returns the Kullback-Leibler divergence of two predictions, in nats per token, over valid tokens."""
    return float(_divergence(logs_BTY, others_BTY, valid_BT))


def _output(m: Pretrained, config: ModelConfig, inputs: Inputs, window: Array | None) -> ModelOutput:
    output: ModelOutput = _run((config, m.placement), m.params, m.router_bias_LC, inputs, window)
    return output


def _log_probs(m: Pretrained, config: ModelConfig, inputs: Inputs, window: Array | None) -> Float[Array, "B T Y"]:
    return jax.nn.log_softmax(_output(m, config, inputs, window).logits_BTY)


@functools.partial(jax.jit, static_argnums=0)
def _run(static: Static, params: Any, bias_LC: Array | None, inputs: Inputs, window: Array | None) -> Any:
    return apply(static, params, bias_LC, inputs, window=window)


@jax.jit
def _divergence(logs_BTY: Array, others_BTY: Array, valid_BT: Array | None) -> Float[Array, ""]:
    lost_BT = (jnp.exp(logs_BTY) * (logs_BTY - others_BTY)).sum(axis=-1)
    return lost_BT.mean() if valid_BT is None else masked_mean(lost_BT.ravel(), valid_BT.ravel())


@functools.partial(jax.jit, static_argnums=0)
def _lost_without(
    static: Static, params: Any, bias_LC: Array | None, given: tuple[Inputs, Array], layer: Int[Array, ""]
) -> Float[Array, ""]:
    inputs, logs_BTY = given
    leaves = named_leaves(params)
    own = leaves[EXPERTS_DOWN]
    kept = (jnp.arange(own.shape[0]) != layer).astype(own.dtype)
    without = params_of_leaves(static[0], {**leaves, EXPERTS_DOWN: own * kept.reshape(-1, 1, 1, 1)})
    output = apply(static, without, bias_LC, inputs)
    return _divergence(logs_BTY, jax.nn.log_softmax(output.logits_BTY), inputs.valid_BT)
