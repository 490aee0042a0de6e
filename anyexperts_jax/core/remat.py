"""Rematerialisation: the names of arrays that can be saved for the backward pass, and the policies that save them.

`jax.ad_checkpoint.checkpoint_name` names an array where it is computed. Only `nn.stack` rematerialises.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from anyexperts_jax.core.errors import require_one_of

ROUTING = "routing"  # the selected experts; every policy saves them, so that a recomputed top-k cannot differ
ROUTER_LOGITS = "router_logits"  # the logits of the router and of the importance network
EXCHANGED = "exchanged"  # the rows received from other devices, and their experts

Remat = Literal["none", "full", "routing", "exchanged", "dots"]


def remat_policy(name: Remat) -> Callable[..., Any]:
    """The checkpoint policy of a name: what is saved of a block's forward pass for its backward pass.

    full: the block's input and the selected experts' indices; everything else is recomputed.
    routing: these and the router's logits.
    exchanged: these and the rows received from other devices, so that the all-to-all is not repeated.
    dots: the router's logits and the result of every matmul.
    The selected indices are always saved: a recomputation may be fused differently, and rounding would then break
    near-ties the other way and send tokens to other experts than in the forward pass.

    Raises:
      UserError: for an unknown name, and for "none", under which nothing is recomputed.
    """
    policies = jax.checkpoint_policies
    with_logits = policies.save_only_these_names(ROUTING, ROUTER_LOGITS)
    kept = {
        "full": policies.save_only_these_names(ROUTING),
        "routing": with_logits,
        "exchanged": policies.save_only_these_names(ROUTING, ROUTER_LOGITS, EXCHANGED),
        "dots": policies.save_from_both_policies(with_logits, policies.dots_with_no_batch_dims_saveable),
    }
    require_one_of("remat", name, kept)
    return kept[name]
