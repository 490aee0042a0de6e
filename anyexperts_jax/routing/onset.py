"""A learned onset: fades AnyExperts in on top of a trained mixture of experts.

A layer with `onset="learned"` has one scalar, its *strength* s. Modulation and the tilt of importance-aware routing use
s w in place of w, and the scores of the virtual experts are multiplied by |s|. At s = 0, where training begins, none of
these has an effect and no virtual expert can win a slot: the layer computes, bit for bit, what the mixture it was
attached to computes. At s = 1 it is the method of the paper.

Training leaves s = 0 by itself. At the first step, s gets a gradient of the task loss through the modulation, and the
importance network gets one from the importance regulariser. From the second step on s is not zero: the task loss then
reaches the importance network too, and the virtual columns take part in the softmax, in the balance loss and, once
l + log |s| is among the best, in the selection.

With `onset="learned_importance"` the virtual experts are those of the mixture itself, as ZEDA's zero experts are: their
scores are not multiplied, and s fades in modulation and tilt alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig


def faded_logits(
    config: AnyExpertsConfig,
    logits_NC: Float[Array, "N C"],
    importance_N: Float[Array, "N"],
    strength: Float[Array, ""],
) -> Float[Array, "N C"]:
    """Returns tilted logits for `route` with iar="off": l + s w, and for virtual columns l - s w + log |s|.

    At s = 0 the virtual columns are -inf and their gradient is zero. With onset="learned_importance" they are l - s w.
    """
    tilt_N1 = (
        strength * importance_N[:, None] if config.switches.iar == "add" else jnp.zeros_like(importance_N)[:, None]
    )
    real_NE = logits_NC[:, : config.num_experts] + tilt_N1
    if config.switches.onset == "learned_importance":
        return jnp.concatenate([real_NE, logits_NC[:, config.num_experts :] - tilt_N1], axis=1)
    off = strength == 0
    log_strength = jnp.where(off, -jnp.inf, jnp.log(jnp.abs(jnp.where(off, 1.0, strength))))
    virtual_NV = logits_NC[:, config.num_experts :] - tilt_N1 + log_strength
    return jnp.concatenate([real_NE, virtual_NV], axis=1)
