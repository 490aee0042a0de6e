"""Mixture-of-experts models in which each token gets as many experts as it deserves.

The names below load on first use, so that importing the package stays fast and brings in no Flax.
"""

from __future__ import annotations  # so that an older Python gets as far as the line that names it

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyexperts_jax.core.config import AnyExpertsConfig
    from anyexperts_jax.core.errors import UserError
    from anyexperts_jax.core.initializers import Constant, FanIn, Normal, Param
    from anyexperts_jax.core.registries import (
        DISPATCHERS,
        DOMAINS,
        FAMILIES,
        IMPLEMENTATIONS,
        METRICS,
        POLICIES,
        REGULARISERS,
        ROUTERS,
        ROW_FORMATS,
        SOURCES,
        TOKENIZERS,
    )
    from anyexperts_jax.core.switches import Switches
    from anyexperts_jax.data.domain import example_generator
    from anyexperts_jax.data.example import Example
    from anyexperts_jax.data.source import FolderFormat
    from anyexperts_jax.dispatch.apply import apply_plan, moe_apply, moe_apply_stats
    from anyexperts_jax.dispatch.base import DispatchStats
    from anyexperts_jax.dispatch.execution import Execution
    from anyexperts_jax.evaluate.run import Run, load_run
    from anyexperts_jax.evaluate.run import train_run as train
    from anyexperts_jax.evaluate.token_routing import TokenRouting
    from anyexperts_jax.evolution.published import upcycle
    from anyexperts_jax.nn.moe import MoE, MoEContext
    from anyexperts_jax.ops.expert_mlp.api import expert_mlp
    from anyexperts_jax.ops.experts import ExpertOps, ExpertWeights
    from anyexperts_jax.pretrained.attach import attach, detach
    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.model import Pretrained
    from anyexperts_jax.pretrained.split import merge, split
    from anyexperts_jax.routing.budget import calibrate_budget, shift_budget
    from anyexperts_jax.routing.plan import RoutingPlan
    from anyexperts_jax.routing.regularisers import Importances
    from anyexperts_jax.routing.route import route
    from anyexperts_jax.routing.routers.base import Router
    from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
    from anyexperts_jax.sharding.placement import Placement
    from anyexperts_jax.tokenizers.base import Tokenizer
    from anyexperts_jax.train.config import RunConfig

_HOMES = {
    "AnyExpertsConfig": "core.config",
    "Constant": "core.initializers",
    "DISPATCHERS": "core.registries",
    "DOMAINS": "core.registries",
    "FAMILIES": "core.registries",
    "DispatchStats": "dispatch.base",
    "Example": "data.example",
    "Execution": "dispatch.execution",
    "ExpertOps": "ops.experts",
    "ExpertWeights": "ops.experts",
    "FanIn": "core.initializers",
    "FolderFormat": "data.source",
    "IMPLEMENTATIONS": "core.registries",
    "Importances": "routing.regularisers",
    "METRICS": "core.registries",
    "MeshConfig": "sharding.mesh",
    "MoE": "nn.moe",
    "MoEContext": "nn.moe",
    "Normal": "core.initializers",
    "POLICIES": "core.registries",
    "Param": "core.initializers",
    "Placement": "sharding.placement",
    "Pretrained": "pretrained.model",
    "REGULARISERS": "core.registries",
    "ROUTERS": "core.registries",
    "ROW_FORMATS": "core.registries",
    "Router": "routing.routers.base",
    "RoutingPlan": "routing.plan",
    "Run": "evaluate.run",
    "RunConfig": "train.config",
    "SOURCES": "core.registries",
    "Switches": "core.switches",
    "TOKENIZERS": "core.registries",
    "TokenRouting": "evaluate.token_routing",
    "Tokenizer": "tokenizers.base",
    "UserError": "core.errors",
    "apply_plan": "dispatch.apply",
    "attach": "pretrained.attach",
    "calibrate_budget": "routing.budget",
    "detach": "pretrained.attach",
    "example_generator": "data.domain",
    "expert_mlp": "ops.expert_mlp.api",
    "load_pretrained": "pretrained.load",
    "load_run": "evaluate.run",
    "make_mesh": "sharding.mesh",
    "merge": "pretrained.split",
    "moe_apply": "dispatch.apply",
    "moe_apply_stats": "dispatch.apply",
    "route": "routing.route",
    "shift_budget": "routing.budget",
    "split": "pretrained.split",
    "train_run": "evaluate.run",  # which the package `train` is when it is called
    "upcycle": "evolution.published",
}

__all__ = [
    "DISPATCHERS",
    "DOMAINS",
    "FAMILIES",
    "IMPLEMENTATIONS",
    "METRICS",
    "POLICIES",
    "REGULARISERS",
    "ROUTERS",
    "ROW_FORMATS",
    "SOURCES",
    "TOKENIZERS",
    "AnyExpertsConfig",
    "Constant",
    "DispatchStats",
    "Example",
    "Execution",
    "ExpertOps",
    "ExpertWeights",
    "FanIn",
    "FolderFormat",
    "Importances",
    "MeshConfig",
    "MoE",
    "MoEContext",
    "Normal",
    "Param",
    "Placement",
    "Pretrained",
    "Router",
    "RoutingPlan",
    "Run",
    "RunConfig",
    "Switches",
    "TokenRouting",
    "Tokenizer",
    "UserError",
    "__version__",
    "apply_plan",
    "attach",
    "calibrate_budget",
    "detach",
    "example_generator",
    "expert_mlp",
    "load_pretrained",
    "load_run",
    "make_mesh",
    "merge",
    "moe_apply",
    "moe_apply_stats",
    "route",
    "shift_budget",
    "split",
    "train",
    "upcycle",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module(f"{__name__}.train")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
