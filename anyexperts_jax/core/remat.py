"""Rematerialisation: the names of arrays that may be kept for the backward pass, and the policies that keep them.

An array gets its name from `jax.ad_checkpoint.checkpoint_name` where it is computed. `nn.stack` alone rematerialises.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from anyexperts_jax.core.errors import require_one_of

ROUTING = "routing"  # who was chosen: every policy keeps it, so that top-k never flips in the second computation
ROUTER_LOGITS = "router_logits"  # the router's and the importance network's
EXCHANGED = "exchanged"  # rows, and their experts, that came from other devices

Remat = Literal["none", "full", "routing", "exchanged", "dots"]


def remat_policy(name: Remat) -> Callable[..., Any]:
    """What the backward pass keeps of a block's forward pass.

    full: the block's input and the selected experts' indices; the rest is computed again.
    routing: the router's logits too.
    exchanged: those and the rows that came from other devices, so that no row travels again.
    dots: the router's logits and every matmul's result.
    Selected indices are always kept: computed again under another fusion, near-ties would choose other experts.

    Raises:
      UserError: for an unknown name, and for "none", under which nothing is computed again.
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
