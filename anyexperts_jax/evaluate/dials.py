"""The inputs of a policy, taken from a model on some data, and the dial at which it gives a budget on them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.core.registries import POLICIES
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import moe_probe
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.placing import place
from anyexperts_jax.routing.policies import Policy, Seen
from anyexperts_jax.routing.scores import probabilities
from anyexperts_jax.sharding.placement import Placement

SEARCH_STEPS = 40
_LARGEST = 1e30

Static = tuple[ModelConfig, Placement]


class Inputs(NamedTuple):
    """A model's inputs."""

    tokens_BT: Int[Array, "B T"]
    placed: PlacedMedia | None = None  # pictures, videos and sounds; None: text only
    valid_BT: Bool[Array, "B T"] | None = None  # False at padding, which is on the right; None: there is none

    @property
    def modality_BT(self) -> Int[Array, "B T"]:
        if self.placed is not None:
            return jnp.asarray(self.placed.modality_BT)
        return jnp.full(self.tokens_BT.shape, int(Modality.TEXT), jnp.int32)


def inputs_of(
    m: Pretrained,
    tokens_BT: Any,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    audios: Sequence[Any] = (),
) -> Inputs:
    """Collects ids and the pictures, videos and sounds that they have placeholders for, as for `m.forward`.

    Raises:
      UserError: if the model cannot read the media, or they do not match the placeholders.
    """
    tokens_BT = np.asarray(tokens_BT, np.int32)
    shown = m.show(images, videos, audios)
    placed = None if shown is None else place(shown, tokens_BT, np.ones(tokens_BT.shape, bool)).media
    return Inputs(jnp.asarray(tokens_BT), placed)


def apply(static: Static, params: Any, bias_LC: Array | None, inputs: Inputs, **more: Any) -> Any:
    """Runs the model; for use in compiled functions."""
    config, placement = static
    model = MultimodalModel(config, placement)
    batch = make_batch(inputs.tokens_BT, **({} if inputs.valid_BT is None else {"valid_BT": inputs.valid_BT}))
    return model.apply({"params": params}, batch, router_bias_LC=bias_LC, placed=inputs.placed, **more)


def seen_by(m: Pretrained, inputs: Inputs) -> Seen:
    """Returns router logits and scores [L, N, E] of all layers under the model's own policy, and modalities [L, N].

    Padding is left out.
    """
    seen = _seen((m.config, m.placement), m.params, m.router_bias_LC, inputs)
    if inputs.valid_BT is None:
        return seen
    kept_N = np.flatnonzero(np.asarray(inputs.valid_BT))
    return jax.tree.map(lambda part: part[:, kept_N], seen)


@functools.partial(jax.jit, static_argnums=0)
def _seen(static: Static, params: Any, bias_LC: Array | None, inputs: Inputs) -> Seen:
    _, variables = apply(static, params, bias_LC, inputs, mutable=["probe"])
    moe = static[0].moe
    logits_LBTC = moe_probe(variables)["logits_BTC"]
    logits_LNC = logits_LBTC.reshape(logits_LBTC.shape[0], -1, moe.num_columns)[..., : moe.num_experts]
    modality_LN = jnp.broadcast_to(inputs.modality_BT.reshape(1, -1), logits_LNC.shape[:2])
    return Seen(logits_LNC, jax.vmap(lambda own: probabilities(moe, own))(logits_LNC), modality_LN)


def find_dial(name: str, seen: Seen, budget: float, most: int) -> float:
    """Finds, by bisection, the dial at which a policy's mean number of slots is closest to the budget.

    Args:
      seen: the inputs in all layers, [L, N, E].
    """
    policy = POLICIES[name]
    logits = seen.logits_NE
    few, many = policy.dial or (float(logits.max()) + 1, float(logits.min()) - 1)
    few, many = max(-_LARGEST, min(few, most)), max(-_LARGEST, min(many, most))

    def mean(dial: float) -> float:
        return float(_mean_slots(policy, most, seen, jnp.float32(dial)))

    for _ in range(SEARCH_STEPS):
        middle = (few + many) / 2
        few, many = (middle, many) if mean(middle) < budget else (few, middle)
    return min((few, many), key=lambda dial: abs(mean(dial) - budget))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_slots(policy: Policy, most: int, seen: Seen, dial: Float[Array, ""]) -> Float[Array, ""]:
    slots_LN = jax.vmap(lambda own: policy.slots(own, dial))(seen)
    return jnp.clip(slots_LN, 1, most).mean()
