"""Mixture-of-experts models in which each token gets as many experts as it deserves.

The names below load on first use, so that importing the package stays fast and brings in no Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyexperts_jax.core.config import AnyExpertsConfig
    from anyexperts_jax.core.errors import UserError
    from anyexperts_jax.dispatch.apply import moe_apply, moe_apply_stats
    from anyexperts_jax.nn.moe import MoE
    from anyexperts_jax.ops.expert_mlp.api import expert_mlp
    from anyexperts_jax.routing.budget import calibrate_budget, shift_budget
    from anyexperts_jax.routing.plan import RoutingPlan
    from anyexperts_jax.routing.route import route

_HOMES = {
    "AnyExpertsConfig": "core.config",
    "MoE": "nn.moe",
    "RoutingPlan": "routing.plan",
    "UserError": "core.errors",
    "calibrate_budget": "routing.budget",
    "expert_mlp": "ops.expert_mlp.api",
    "moe_apply": "dispatch.apply",
    "moe_apply_stats": "dispatch.apply",
    "route": "routing.route",
    "shift_budget": "routing.budget",
}

__all__ = [
    "AnyExpertsConfig",
    "MoE",
    "RoutingPlan",
    "UserError",
    "__version__",
    "calibrate_budget",
    "expert_mlp",
    "moe_apply",
    "moe_apply_stats",
    "route",
    "shift_budget",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
