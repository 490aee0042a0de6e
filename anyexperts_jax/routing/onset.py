"""A learned onset: AnyExperts on top of a trained mixture, from no effect at all to the method as it is.

A layer with `onset="learned"` has one scalar, its *strength* s. Modulation is by s w in place of w, the tilt of
importance-aware routing too, and the scores of the virtual experts are multiplied by |s|. At s = 0, where training
begins, nothing of this has an effect and no virtual expert can win a slot: the layer is, bit for bit, the mixture it
was attached to. At s = 1 it is the method of the paper.

Training leaves s = 0 by itself. The modulation gives s a gradient of the task loss at the first step, and the
importance regulariser gives the importance network one. From the second step on s is not zero, so that the task moves
the importance network as well, and the virtual columns take part in the softmax, in the balance loss and, once
l + log |s| is among the best, in the selection.
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
    """Logits with the tilt in them, for `route` with iar="off": l + s w, and of virtual columns l - s w + log |s|.

    At s = 0 the virtual columns are -inf and their gradient is zero.
    """
    tilt_N1 = (
        strength * importance_N[:, None] if config.switches.iar == "add" else jnp.zeros_like(importance_N)[:, None]
    )
    real_NE = logits_NC[:, : config.num_experts] + tilt_N1
    off = strength == 0
    log_strength = jnp.where(off, -jnp.inf, jnp.log(jnp.abs(jnp.where(off, 1.0, strength))))
    virtual_NV = logits_NC[:, config.num_experts :] - tilt_N1 + log_strength
    return jnp.concatenate([real_NE, virtual_NV], axis=1)
