"""Low-rank adapters in a model's parameters: which weights have one, and adding them to the weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.names import lora_names
from anyexperts_jax.core.patterns import matching, require_match
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, logical_axes, named_leaves

_FACTORS = lora_names("")  # the endings of the factors' names
RANK_AXIS = "lora"


def is_adapter(name: str) -> bool:
    """Whether a parameter is a factor of an adapter."""
    return name.endswith(_FACTORS)


def adapted_weights(model: ModelConfig) -> list[str]:
    """The names of the weights that have an adapter."""
    first = _FACTORS[0]
    return [name.removesuffix(first) for name in named_leaves(abstract_params(model)) if name.endswith(first)]


def without_adapters(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, stack=dataclasses.replace(model.stack, lora=None))


def require_adapted(model: ModelConfig) -> None:
    """Checks that each pattern of `stack.lora.patterns` matches a weight that can be adapted.

    Raises:
      UserError: naming the pattern, and the parameters that it matches or that are nearest to it.
    """
    if model.stack.lora is None:
        return
    own, every = adapted_weights(model), named_leaves(abstract_params(without_adapters(model)))
    for pattern in model.stack.lora.patterns:
        found = require_match("model.stack.lora.patterns", pattern, every)
        require(
            bool(matching(pattern, own)),
            f"model.stack.lora.patterns: {pattern!r} matches only parameters that take no adapter, as {found[0]}; "
            "adapters fit the kernels of attention and of dense and shared FFNs, and the experts' matrices",
        )


def factor_axes(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The logical axes of every parameter by name."""
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda names: isinstance(names, tuple))
    return dict(zip(named_leaves(abstract_params(model)), axes, strict=True))


def factors(model: ModelConfig, leaves: Mapping[str, Any], weight: str) -> tuple[Array, Array]:
    """A [*batch, X, R] and B [*batch, R, Y] of a weight's adapter. The input axes are flattened into X, the output
    axes into Y."""
    a_name, b_name = lora_names(weight)
    a, b = jnp.asarray(leaves[a_name]), jnp.asarray(leaves[b_name])
    batch = factor_axes(model)[b_name].index(RANK_AXIS)
    rank = a.shape[-1]
    return a.reshape(*a.shape[:batch], -1, rank), b.reshape(*b.shape[:batch], rank, -1)


def added(model: ModelConfig, leaves: Mapping[str, Any], sign: int = 1) -> dict[str, Float[Array, "..."]]:
    """The adapted weights by name, each with its adapter added (`sign=1`) or subtracted (-1), in the weight's dtype.

    Args:
      model: a configuration that has `stack.lora`.
      leaves: the weights and the adapters' factors by name.
    """
    lora = model.stack.lora
    assert lora is not None
    found = {}
    for name in adapted_weights(model):
        weight = jnp.asarray(leaves[name])
        a, b = factors(model, leaves, name)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        if product.size != weight.size:  # all experts of a layer share one pair
            product = jnp.broadcast_to(product[:, None], (*weight.shape[:2], *product.shape[1:]))
        delta = sign * lora.scale * product.reshape(weight.shape)
        found[name] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
    return found
