"""The model with a single one of its experts, and the distances between experts."""

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


def single_expert_apply(model: ModelConfig, placement: Placement | None = None, expert: int = 0) -> Apply:
    """The model in which every token goes to one expert, by default the first, as a function of all its parameters.

    The other experts and the routers get no gradient.
    """
    inner = model_apply(single_expert_model(model), placement)

    def apply(
        params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Array, RoutingTrace]:
        return inner(single_expert_params(model, params, expert), batch, router_bias_LC, key, None)

    return apply


def single_expert_params(model: ModelConfig, params: Any, expert: Array | int) -> Any:
    """The parameters of the model whose only expert is `expert`, counted from 0."""

    def chosen(name: str, weight: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(weight, expert, 1, axis=1) if is_a("expert", name) else weight

    leaves = {name: chosen(name, weight) for name, weight in named_leaves(params).items()}
    leaves[ROUTER_KERNEL] = jnp.zeros((model.stack.num_moe_layers, model.stack.d_model, 1), jnp.float32)
    return params_of_leaves(single_expert_model(model), leaves)


def single_expert_model(model: ModelConfig) -> ModelConfig:
    """The configuration of the model with one expert. Dispatch is dense: on any mesh, tokens stay on their device."""
    stack = dataclasses.replace(model.stack, execution=Execution(dispatch="dense"))
    return dataclasses.replace(model, stack=stack, moe=AnyExpertsConfig.static_top_k(1, 1))


@jax.jit
def expert_products(experts: list[Float[Array, "L E _ _"]]) -> tuple[Float[Array, "E E"], Float[Array, "E E"]]:
    """Inner products and squared distances of the experts' weights, in float32 over all of their weights.

    Distances are summed from differences: computed from the inner products they would cancel for similar experts.
    """
    count = experts[0].shape[1]
    products_EE, distances_EE = jnp.zeros((count, count)), jnp.zeros((count, count))
    for leaf in experts:
        wide = leaf.astype(jnp.float32)
        products_EE += jnp.einsum("lexy,lfxy->ef", wide, wide, precision=jax.lax.Precision.HIGHEST)
        rows = jax.lax.map(lambda e, w=wide: ((w - w[:, e][:, None]) ** 2).sum((0, 2, 3)), jnp.arange(count))
        distances_EE += rows
    return products_EE, distances_EE


def expert_similarity(model: ModelConfig, params: Any) -> tuple[Float[np.ndarray, "E E"], Float[np.ndarray, "E E"]]:
    """(distance, cosine) between experts over the weights of all layers; distances are relative to expert 1's norm."""
    flags, leaves = jax.tree.leaves(leaves_of(model, "expert")), jax.tree.leaves(params)
    products, squares = expert_products([leaf for flag, leaf in zip(flags, leaves, strict=True) if flag])
    products_EE, squares_EE = np.asarray(products, np.float64), np.asarray(squares, np.float64)
    norm_E = np.sqrt(np.diag(products_EE))
    return np.sqrt(squares_EE) / norm_E[0], products_EE / np.outer(norm_E, norm_E)


def expert_measure(model: ModelConfig) -> Callable[[TrainState, Validation], dict[str, Any]]:
    """Measures the experts for a validation record: each one's loss when used alone, and its distance and cosine to
    expert 1.

    One compiled program serves all experts and all records.
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
    """`single_expert_apply` for parameters that come with the expert's number."""
    inner = model_apply(single_expert_model(model), placement)

    def apply(
        chosen: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Array, RoutingTrace]:
        params = single_expert_params(model, chosen["params"], chosen["expert"])
        return inner(params, batch, router_bias_LC, key, None)

    return apply
