"""Dispatch and combine: data movement between tokens and experts.

execution       `Execution`, how a layer is computed: dispatch, implementation, residuals, capacity, overflow
apply           `moe_apply`, which runs the dispatcher and adds the virtual slots' output
base            the interface of a dispatcher; sorting slots by expert, and the rows of buffers
blocks          dropless: time is proportional to the real slots; on a mesh each device computes its own tokens
capacity        buffers [E, C, D] sized by the budget; slots beyond the capacity are dropped and counted
exchange        expert parallelism: tokens go to the experts' devices and back by all-to-all, one row for each device
token_rows      which rows a device sends where, and the slots that travel with them
exchange_sizes  the sizes of the buffers, from the budget
dense           every expert on every token: the oracle
local_tokens    the `shard_map` that `blocks` and `exchange` share
"""

from anyexperts_jax.dispatch.apply import moe_apply, moe_apply_stats
from anyexperts_jax.dispatch.base import DispatchStats
from anyexperts_jax.dispatch.execution import Execution

__all__ = ["DispatchStats", "Execution", "moe_apply", "moe_apply_stats"]
