"""Policies: how many slots a token gets, as a function of its router scores and one number, the dial.

The paper's policy, "importance", is the window of `routing.window`, and so is the same number for all tokens of a layer
(k_min = k_max). The policies here need no training: they read what the router says anyway. Each is monotone in its
dial, so that a mean number of slots can be looked for. In training, `policy_dial` is the dial; at any budget, the
window in force is (dial, most slots) in place of (k_min, k_max).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.modality import Modality

IMPORTANCE = "importance"
_GOLDEN = 0.6180339887498949
_DIGITS = 4096.0  # a score times this, modulo one, is as good as drawn


class Seen(NamedTuple):
    """What a policy sees of N tokens: the real columns, float32."""

    logits_NE: Float[Array, "N E"]
    scores_NE: Float[Array, "N E"]  # summing to one per token
    modality_N: Int[Array, "N"] | None = None  # core.modality.Modality; None: all are text


@dataclasses.dataclass(frozen=True)
class Policy:
    """An entry of `core.registries.POLICIES`.

    Attributes:
      slots: (what it sees, the dial) -> slots, unrounded; below one slot counts as one.
      dial: the dial's range, from that end at which tokens get the fewest slots; None: the range of the logits, from
        the highest down.
      by_modality: whether it tells text from other tokens; on text alone it is then another policy under a second name.
      by_token: whether `slots` takes a dial for each token, [N], too.
      causal: whether a token's slots depend on that token alone. False: a control for measurements, not for decoding.
    """

    slots: Callable[[Seen, Float[Array, "*N"]], Float[Array, "N"]]
    dial: tuple[float, float] | None
    causal: bool = True
    by_modality: bool = False
    by_token: bool = False


def _static(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    return jnp.full(seen.scores_NE.shape[0], jnp.floor(dial + 0.5))


def _static_modality(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """The dial, rounded, for text; half of that, rounded up, for a token of a picture, a video or a sound."""
    text = jnp.floor(dial + 0.5)
    if seen.modality_N is None:
        return jnp.full(seen.scores_NE.shape[0], text)
    return jnp.where(seen.modality_N == Modality.TEXT, text, jnp.ceil(text / 2))


def _mixed(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """The whole numbers around the dial, by the digits of the token's best score."""
    place_N = seen.scores_NE.max(axis=1) * _DIGITS * _GOLDEN % 1.0
    return jnp.floor(dial) + (place_N < dial % 1.0).astype(jnp.float32)


def _top_p(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """The fewest experts whose scores sum to the dial."""
    before_NE = jnp.cumsum(-jnp.sort(-seen.scores_NE, axis=1), axis=1)
    return 1.0 + (before_NE < dial).sum(axis=1).astype(jnp.float32)


def _score_gap(seen: Seen, dial: Float[Array, "*N"]) -> Float[Array, "N"]:
    """Experts whose score is at least the dial times the token's best."""
    return _count(seen.scores_NE >= _of_tokens(dial, seen) * seen.scores_NE.max(axis=1, keepdims=True))


def _threshold(seen: Seen, dial: Float[Array, "*N"]) -> Float[Array, "N"]:
    """Experts whose score is at least the dial."""
    return _count(seen.scores_NE >= _of_tokens(dial, seen))


def _logit_threshold(seen: Seen, dial: Float[Array, "*N"]) -> Float[Array, "N"]:
    """Experts whose logit is at least the dial. Of the router "markers": whose output's predicted norm is large."""
    return _count(seen.logits_NE >= _of_tokens(dial, seen))


def _shuffled(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """The numbers of top_p, dealt out to the tokens at random: what a policy is worth whose choice means nothing."""
    return jax.random.permutation(jax.random.key(0), _top_p(seen, dial))


def _of_tokens(dial: Float[Array, "*N"], seen: Seen) -> Float[Array, "N 1"]:
    return jnp.broadcast_to(dial, seen.scores_NE.shape[:1])[:, None]


def _count(kept_NE: Array) -> Float[Array, "N"]:
    return kept_NE.sum(axis=1).astype(jnp.float32)


STATIC = Policy(_static, (1.0, float("inf")))
STATIC_MODALITY = Policy(_static_modality, (1.0, float("inf")), by_modality=True)
MIXED = Policy(_mixed, (1.0, float("inf")))
TOP_P = Policy(_top_p, (0.0, 1.0))
SCORE_GAP = Policy(_score_gap, (1.0, 0.0), by_token=True)
THRESHOLD = Policy(_threshold, (1.0, 0.0), by_token=True)
LOGIT_THRESHOLD = Policy(_logit_threshold, None, by_token=True)
SHUFFLED = Policy(_shuffled, (0.0, 1.0), causal=False)
