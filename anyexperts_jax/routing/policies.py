"""Policies decide how many slots a token gets, from its router scores and one number, the dial.

The paper's policy, "importance", uses the window of `routing.window`; with k_min = k_max it gives all tokens the same
number. The policies here need no training, since they only read the router's scores. Each is monotone in its dial, so
that a search can find the dial of a given mean number of slots. In training the dial is `policy_dial`; otherwise the
window in force is (dial, most slots) instead of (k_min, k_max).
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
_DIGITS = 4096.0  # a score times this, modulo one, is practically a random number


class Seen(NamedTuple):
    """The inputs of a policy for N tokens: the real columns, float32."""

    logits_NE: Float[Array, "N E"]
    scores_NE: Float[Array, "N E"]  # summing to one per token
    modality_N: Int[Array, "N"] | None = None  # core.modality.Modality; None: all are text


@dataclasses.dataclass(frozen=True)
class Policy:
    """An entry of `core.registries.POLICIES`.

    Attributes:
      slots: (inputs, dial) -> unrounded slots; less than one counts as one.
      dial: the range of the dial, beginning at the end that gives the fewest slots; None: the range of the logits, from
        the highest down.
      causal: whether a token's slots depend on that token alone. False: only a control for measurements, not for
        decoding.
      by_modality: whether it treats text and other tokens differently; on text alone it then equals another policy.
      by_token: whether `slots` also accepts one dial per token, [N].
    """

    slots: Callable[[Seen, Float[Array, "*N"]], Float[Array, "N"]]
    dial: tuple[float, float] | None
    causal: bool = True
    by_modality: bool = False
    by_token: bool = False


def _static(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    return jnp.full(seen.scores_NE.shape[0], jnp.floor(dial + 0.5))


def _static_modality(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """Gives text the rounded dial, and tokens of pictures, videos and sounds half of it, rounded up."""
    text = jnp.floor(dial + 0.5)
    if seen.modality_N is None:
        return jnp.full(seen.scores_NE.shape[0], text)
    return jnp.where(seen.modality_N == Modality.TEXT, text, jnp.ceil(text / 2))


def _mixed(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """Gives one of the two whole numbers around the dial, chosen pseudo-randomly from digits of the best score."""
    place_N = seen.scores_NE.max(axis=1) * _DIGITS * _GOLDEN % 1.0
    return jnp.floor(dial) + (place_N < dial % 1.0).astype(jnp.float32)


def _top_p(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """Gives the fewest experts whose scores sum to the dial."""
    before_NE = jnp.cumsum(-jnp.sort(-seen.scores_NE, axis=1), axis=1)
    return 1.0 + (before_NE < dial).sum(axis=1).astype(jnp.float32)


def _score_gap(seen: Seen, dial: Float[Array, "*N"]) -> Float[Array, "N"]:
    """Counts the experts whose score is at least the dial times the token's best."""
    return _count(seen.scores_NE >= _dial_per_token(dial, seen) * seen.scores_NE.max(axis=1, keepdims=True))


def _threshold(seen: Seen, dial: Float[Array, "*N"]) -> Float[Array, "N"]:
    """Counts the experts whose score is at least the dial."""
    return _count(seen.scores_NE >= _dial_per_token(dial, seen))


def _logit_threshold(seen: Seen, dial: Float[Array, "*N"]) -> Float[Array, "N"]:
    """Counts the experts whose logit is at least the dial. The router "markers" predicts the norms of outputs so."""
    return _count(seen.logits_NE >= _dial_per_token(dial, seen))


def _shuffled(seen: Seen, dial: Float[Array, ""]) -> Float[Array, "N"]:
    """Assigns the numbers of top_p to the tokens at random: a baseline whose choice carries no information."""
    return jax.random.permutation(jax.random.key(0), _top_p(seen, dial))


def _dial_per_token(dial: Float[Array, "*N"], seen: Seen) -> Float[Array, "N 1"]:
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
