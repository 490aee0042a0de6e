"""Data movement between tokens and experts.

execution   `Execution`, how a layer is computed: dispatch, implementation, residuals, capacity, overflow
apply       `moe_apply`, which runs the dispatcher and adds the virtual slots' part
base        what a dispatcher is; sorting slots by expert and the rows of buffers
blocks      dropless: the time follows the real slots; on a mesh each device computes its own tokens
capacity    buffers [E, C, D] sized by the budget; what does not fit is counted
exchange    experts on many devices: rows travel there and back by all-to-all
dense       every expert on every token: the oracle
own_tokens  the `shard_map` that `blocks` and `exchange` share
"""

from anyexperts_jax.dispatch.apply import moe_apply, moe_apply_stats
from anyexperts_jax.dispatch.base import DispatchStats
from anyexperts_jax.dispatch.execution import Execution

__all__ = ["DispatchStats", "Execution", "moe_apply", "moe_apply_stats"]
