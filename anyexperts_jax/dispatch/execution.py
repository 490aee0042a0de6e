"""`Execution`: how a MoE layer is computed, as opposed to what it computes."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.registries import DISPATCHERS, IMPLEMENTATIONS
from anyexperts_jax.ops._select import default_implementation, implementation_for
from anyexperts_jax.sharding.placement import Placement, is_split

Residuals = Literal["saved", "recomputed"]
Overflow = Literal["drop", "fallback"]
BUFFERED = ("auto", "capacity", "exchange")  # dispatchers whose buffers can have a fixed size, and so overflow


@dataclasses.dataclass(frozen=True)
class Execution:
    """How experts are computed. As long as nothing is dropped, no field changes the result.

    Raises:
      UserError: naming the value and the valid ones.
    """

    dispatch: str = "blocks"  # how rows move between tokens and experts, an entry of DISPATCHERS; auto: by bytes
    implementation: str | None = None  # of the expert ops, an entry of IMPLEMENTATIONS; None: the device's fastest
    residuals: Residuals = "saved"  # saved: keep gate and up for the backward pass; recomputed: recompute them there
    capacity_factor: float = 1.25  # rows of a buffer, relative to the rows that the budget expects in it
    overflow: Overflow = "drop"  # slots beyond the capacity: dropped and counted, or computed exactly in extra passes
    exchange_chunks: int = 1  # parts of a device's positions that dispatch="exchange" sends separately, to overlap them

    def __post_init__(self) -> None:
        check_field_types(self)
        DISPATCHERS.check("dispatch", self.dispatch)
        if self.implementation is not None:
            IMPLEMENTATIONS.check("implementation", self.implementation)
        require_one_of("residuals", self.residuals, get_args(Residuals))
        require_one_of("overflow", self.overflow, get_args(Overflow))
        require(self.capacity_factor > 0, f"capacity_factor={self.capacity_factor} must be > 0")
        require(self.exchange_chunks >= 1, f"exchange_chunks={self.exchange_chunks} must be >= 1")

    @property
    def op_options(self) -> dict[str, Any]:
        """The options that the expert ops take."""
        return {"implementation": self.implementation, "residuals": self.residuals}


def require_capacity_for(config: AnyExpertsConfig, execution: Execution) -> None:
    """Checks that buffers can hold at least the real slots that every token gets.

    Raises:
      UserError: naming the capacity factor and the slots.
    """
    if execution.dispatch not in BUFFERED:
        return
    fewest = int(config.k_min)
    least = fewest - config.virtual_cap(fewest)  # checking k_min is enough: k - cap(k) never falls
    room = execution.capacity_factor * config.expected_real_slots
    require(
        room >= least,
        f"capacity_factor={execution.capacity_factor} gives room for {room:g} real slots per token, fewer than the "
        f"{least} every token gets from k_min={config.k_min}; raise it",
    )


def resolve_implementation(execution: Execution, placement: Placement | None, dtype: jnp.dtype) -> Execution:
    """`execution` with the implementation that will run, so that a model on a mesh can report it once.

    `blocks`, `exchange` and thus `auto` compute each device's part separately, so they use the device's kernels
    everywhere. "capacity" and "dense" do so on one device only: on several, XLA partitions them, and it cannot
    partition a kernel, so they use the "xla" implementation.
    """
    if execution.implementation is not None:
        return execution
    if placement is None:
        name = default_implementation(dtype)
    elif is_split(placement) and execution.dispatch in ("capacity", "dense"):
        name = "xla"
    else:
        name = implementation_for(placement.device.platform, placement.device.device_kind, dtype)
    return dataclasses.replace(execution, implementation=name)
