"""dispatch="auto": `blocks` or `exchange`, whichever moves fewer bytes for the tokens at hand."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.quantities import bytes_text
from anyexperts_jax.core.registries import DISPATCHERS
from anyexperts_jax.dispatch.base import DispatchStats
from anyexperts_jax.dispatch.exchange_sizes import buffer_sizes
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.dispatch.local_tokens import token_axes
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import parts

_WAYS = 4  # of a row, in a training step: to the experts and back, and so its gradient
_GATHERS = 3  # of a weight: one for each pass, and the sum of its gradient over the devices


class LayerSizes(NamedTuple):
    """What the choice depends on, besides the budget."""

    tokens: int  # of a device
    slots_bound: int  # K, the most slots of a token
    width: int  # D
    hidden: int  # F, the part of it that a device computes
    itemsize: int  # bytes of a number in the compute dtype
    expert_devices: int  # that the experts are split over


class Choice(NamedTuple):
    """What a device sends for a MoE layer in a training step, in bytes, and the dispatch that sends less."""

    rows: float  # with `exchange`
    weights: float  # with `blocks`, beyond what `exchange` gathers too

    @property
    def dispatch(self) -> str:
        return "exchange" if self.rows < self.weights else "blocks"

    def __str__(self) -> str:
        return (
            f'dispatch="auto" is {self.dispatch}: per device and MoE layer, a training step would send '
            f"{bytes_text(self.rows)} of rows, or {bytes_text(self.weights)} of experts and their gradients"
        )


def choose_dispatch(spec: PlanSpec, capacity_factor: float, sizes: LayerSizes) -> Choice:
    """Compares the bytes that a device sends in a training step with `exchange` and with `blocks`.

    Both send (n - 1) / n of what they move to n - 1 other devices over the same links, so neither the speed of a link
    nor the compute dtype matters. `exchange` moves the rows of its buffers there and back, and so their gradients;
    `blocks` gathers all experts twice and sums their gradients. So `exchange` sends less if its buffers have fewer than
    9/4 E F rows. Our reading.

    Raises:
      UserError: for experts that do not split over the devices.

    Example: 256 experts of width 512, 8 slots in 4 of 8 groups, 8 devices: `exchange` below 59k tokens per device.
    """
    devices = sizes.expert_devices
    if devices == 1:
        return Choice(rows=0.0, weights=0.0)
    share = (devices - 1) / devices
    held = devices * buffer_sizes(spec, capacity_factor, sizes.tokens, devices, sizes.slots_bound).rows
    numbers = 3 * spec.num_experts * sizes.width * sizes.hidden
    return Choice(
        rows=share * held * sizes.width * _WAYS * sizes.itemsize,
        weights=share * numbers * _GATHERS * sizes.itemsize,
    )


def dispatch_auto(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher` that calls the choice of `choose_dispatch`; `blocks` where no axis splits experts.

    The choice depends on shapes alone and is made when the layer is traced.
    """
    chosen = "blocks" if placement is None else _choice(x_ND, plan, experts, execution, placement).dispatch
    y_ND, stats = DISPATCHERS[chosen](x_ND, plan, experts, execution, placement)
    return y_ND, stats


def _choice(
    x_ND: Array, plan: RoutingPlan, experts: ExpertWeights, execution: Execution, placement: Placement
) -> Choice:
    rules, mesh = placement.rules, placement.mesh
    sizes = LayerSizes(
        tokens=x_ND.shape[0] // parts(mesh, token_axes(placement)),
        slots_bound=plan.expert_ids_NK.shape[1],
        width=x_ND.shape[1],
        hidden=experts.gate_EDF.shape[2] // parts(mesh, rules.expert_mlp),
        itemsize=jnp.dtype(x_ND.dtype).itemsize,
        expert_devices=parts(mesh, rules.expert) if isinstance(rules.expert, str) else 1,
    )
    return choose_dispatch(plan.spec, execution.capacity_factor, sizes)
