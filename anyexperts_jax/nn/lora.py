"""Low-rank adapters (LoRA, arXiv 2106.09685) and the one function through which modules get them.

A module that contracts with a weight asks `low_rank` for the adapter of that weight by name. There is one if a pattern
of `LoraConfig` matches the weight's path; its parameters stand beside the weight as "NAME_lora_a" and "NAME_lora_b".
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.initializers import Constant, FanIn
from anyexperts_jax.core.names import lora_names
from anyexperts_jax.core.patterns import matching
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.nn.params import AxisNames, named


class WeightAxes(NamedTuple):
    """A weight's shape and logical axes: `num_batch` batch axes (one matrix per entry), `num_in` input axes, then
    output axes."""

    shape: tuple[int, ...]
    axes: AxisNames
    num_in: int = 1
    num_batch: int = 0


class LowRank(NamedTuple):
    """The two factors of an adapter, in float32."""

    a: Float[Array, "..."]  # the weight's batch and input axes, then R
    b: Float[Array, "..."]  # the weight's batch axes, R, then its output axes
    scale: float


def low_rank(module: nn.Module, config: LoraConfig | None, name: str, weight: WeightAxes) -> LowRank | None:
    """The adapter of the weight `name` of a module, declared as its parameters; None where no pattern matches it."""
    if config is None:
        return None
    path = "/".join((*module.path, name))
    if not any(matching(pattern, [path]) for pattern in config.patterns):
        return None
    first = weight.num_batch + weight.num_in
    batch = slice(0, 0 if config.experts == "shared" else weight.num_batch)
    inputs, outputs = slice(weight.num_batch, first), slice(first, None)
    a_name, b_name = lora_names(name)
    init = FanIn(num_in=weight.num_in, num_batch=batch.stop)
    rank = (config.rank,)
    a = module.param(
        a_name,
        named(init, (*weight.axes[batch], *weight.axes[inputs], "lora")),
        (*weight.shape[batch], *weight.shape[inputs], *rank),
        jnp.float32,
    )
    b = module.param(
        b_name,
        named(Constant(0.0), (*weight.axes[batch], "lora", *weight.axes[outputs])),
        (*weight.shape[batch], *rank, *weight.shape[outputs]),
        jnp.float32,
    )
    return LowRank(a, b, config.scale)


def adapted(weight_EXY: Float[Array, "E X Y"], adapter: LowRank | None) -> Float[Array, "E X Y"]:
    """The experts' weights with their adapters added, in float32. Any implementation of the experts can use the sum."""
    if adapter is None:
        return weight_EXY
    product = jnp.matmul(adapter.a, adapter.b)  # [E, X, Y], or [X, Y] shared by all experts
    delta_EXY = adapter.scale * (product if product.ndim == weight_EXY.ndim else product[None])
    return weight_EXY.astype(jnp.float32) + delta_EXY
