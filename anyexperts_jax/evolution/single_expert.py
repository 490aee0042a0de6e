"""One expert in place of all: the model a token sees that always goes to it, and how far experts are apart."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import named_leaves, params_of_leaves
from anyexperts_jax.models.paths import ROUTER_KERNEL, is_a, leaves_of
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.step import Apply, model_apply
from anyexperts_jax.train.validation import Validation


def apply_alone(model: ModelConfig, placement: Placement | None = None, expert: int = 0) -> Apply:
    """The model with every token at one expert, by default the first, as a function of all its parameters.

    No other expert and no router has a gradient.
    """
    inner = model_apply(alone_model(model), placement)

    def apply(
        params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Array, RoutingTrace]:
        return inner(expert_alone(model, params, expert), batch, router_bias_LC, key, None)

    return apply


def expert_alone(model: ModelConfig, params: Any, expert: Array | int) -> Any:
    """Parameters of the model whose only expert is `expert`, 0 for the first."""

    def chosen(name: str, weight: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(weight, expert, 1, axis=1) if is_a("expert", name) else weight

    leaves = {name: chosen(name, weight) for name, weight in named_leaves(params).items()}
    leaves[ROUTER_KERNEL] = jnp.zeros((model.stack.num_moe_layers, model.stack.d_model, 1), jnp.float32)
    return params_of_leaves(alone_model(model), leaves)


def alone_model(model: ModelConfig) -> ModelConfig:
    """The model with one expert. There is nobody to dispatch to: every token stays where it is, on any mesh."""
    stack = dataclasses.replace(model.stack, execution=Execution(dispatch="dense"))
    return dataclasses.replace(model, stack=stack, moe=AnyExpertsConfig.static_top_k(1, 1))


@jax.jit
def expert_products(experts: list[Float[Array, "L E _ _"]]) -> tuple[Float[Array, "E E"], Float[Array, "E E"]]:
    """Over all weights of the experts in float32: inner products, and squared distances (from differences)."""
    count = experts[0].shape[1]
    products_EE, distances_EE = jnp.zeros((count, count)), jnp.zeros((count, count))
    for leaf in experts:
        wide = leaf.astype(jnp.float32)
        products_EE += jnp.einsum("lexy,lfxy->ef", wide, wide, precision=jax.lax.Precision.HIGHEST)
        rows = jax.lax.map(lambda e, w=wide: ((w - w[:, e][:, None]) ** 2).sum((0, 2, 3)), jnp.arange(count))
        distances_EE += rows
    return products_EE, distances_EE


def expert_similarity(model: ModelConfig, params: Any) -> tuple[Float[np.ndarray, "E E"], Float[np.ndarray, "E E"]]:
    """(distance, cosine) between experts over all layers' weights; distance relative to expert 1's norm."""
    flags, leaves = jax.tree.leaves(leaves_of(model, "expert")), jax.tree.leaves(params)
    products, squares = expert_products([leaf for flag, leaf in zip(flags, leaves, strict=True) if flag])
    products_EE, squares_EE = np.asarray(products, np.float64), np.asarray(squares, np.float64)
    norm_E = np.sqrt(np.diag(products_EE))
    return np.sqrt(squares_EE) / norm_E[0], products_EE / np.outer(norm_E, norm_E)


def expert_measure(model: ModelConfig) -> Callable[[TrainState, Validation], dict[str, Any]]:
    """What a validation record tells of experts: each one's loss alone, its distance from expert 1 and cosine to it.

    One compilation for all experts, kept from one record to the next.
    """
    kept: list[Validation] = []

    def measure(state: TrainState, validation: Validation) -> dict[str, Any]:
        if not kept:
            kept.append(validation.of(_apply_chosen(model, Placement(validation.mesh))))
        distance_EE, cosine_EE = expert_similarity(model, state.params)
        experts = {}
        for n in range(model.moe.num_experts):
            chosen = dataclasses.replace(state, params={"params": state.params, "expert": jnp.int32(n)})
            loss = kept[0](chosen)["loss"]
            apart = {"distance": float(distance_EE[0, n]), "cosine": float(cosine_EE[0, n])}
            experts[f"expert_{n + 1}"] = {"loss": loss, **apart}
        return {"experts": experts}

    return measure


def _apply_chosen(model: ModelConfig, placement: Placement) -> Apply:
    """`apply_alone` for parameters that come with the expert's number."""
    inner = model_apply(alone_model(model), placement)

    def apply(
        chosen: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Array, RoutingTrace]:
        params = expert_alone(model, chosen["params"], chosen["expert"])
        return inner(params, batch, router_bias_LC, key, None)

    return apply
