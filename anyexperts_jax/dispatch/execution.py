"""`Execution`: how a MoE layer is computed, never what."""

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
BUFFERED = ("capacity", "exchange")  # dispatchers whose buffers have a size, so that slots can overflow


@dataclasses.dataclass(frozen=True)
class Execution:
    """How experts are computed. No field changes the result of a layer that drops nothing.

    Raises:
      UserError: naming the value and the valid ones.
    """

    dispatch: str = "blocks"  # how rows move between tokens and experts, an entry of DISPATCHERS
    implementation: str | None = None  # of the expert ops, an entry of IMPLEMENTATIONS; None: the device's fastest
    residuals: Residuals = "saved"  # gate and up kept for the backward pass, or computed again there
    capacity_factor: float = 1.25  # rows of a buffer over the rows that the budget expects in it
    overflow: Overflow = "drop"  # what does not fit: dropped and counted, or computed exactly in further passes
    exchange_chunks: int = 1  # into which dispatch="exchange" cuts a device's positions, to send one beside another

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
        """What the expert ops take of it."""
        return {"implementation": self.implementation, "residuals": self.residuals}


def require_capacity_for(config: AnyExpertsConfig, execution: Execution) -> None:
    """Refuses buffers that cannot hold the real slots that every token gets.

    Raises:
      UserError: naming the capacity factor and the slots.
    """
    if execution.dispatch not in BUFFERED:
        return
    fewest = int(config.k_min)
    least = fewest - config.virtual_cap(fewest)  # k - virtual_cap(k) never falls: rho_max < 1
    room = execution.capacity_factor * config.expected_real_slots
    require(
        room >= least,
        f"capacity_factor={execution.capacity_factor} gives room for {room:g} real slots per token, fewer than the "
        f"{least} every token gets from k_min={config.k_min}; raise it",
    )


def resolve_implementation(execution: Execution, placement: Placement | None, dtype: jnp.dtype) -> Execution:
    """`execution` with the implementation that runs. Whoever builds a model on a mesh can show it once.

    The kernels of the device where `dispatch` computes each device's own part, by `blocks` and `exchange` everywhere
    and by the others on one device. "capacity" and "dense" on several devices are cut into parts by XLA, which cannot
    cut a kernel, so they run its implementation.
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
