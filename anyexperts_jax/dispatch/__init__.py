"""Data movement between tokens and experts.

base      sorting slots by expert; the gather pairs every form is built from
capacity  buffers [E, C, D] sized by the budget: the form that shards; what does not fit is counted
blocks    dropless on one shard: the time follows the real slots
dense     every expert on every token: the oracle
apply     `moe_apply`, the choice among them, and the virtual slots' part
"""

from anyexperts_jax.dispatch.apply import moe_apply, moe_apply_stats
from anyexperts_jax.dispatch.base import DispatchStats

__all__ = ["DispatchStats", "moe_apply", "moe_apply_stats"]
