"""What dispatch="auto" is in a training step."""

import dataclasses

import jax.numpy as jnp

from anyexperts_jax.dispatch.auto import Choice, LayerSizes, choose_dispatch
from anyexperts_jax.routing.plan import plan_spec
from anyexperts_jax.sharding.specs import token_shards
from anyexperts_jax.train.config import RunConfig


def auto_choice(config: RunConfig, mesh: dict[str, int]) -> Choice | None:
    """The choice on a mesh with these sizes; None if the configuration names a dispatch."""
    stack, moe, train = config.model.stack, config.model.moe, config.train
    if stack.execution.dispatch != "auto":
        return None
    positions = train.batch_size * config.data.encoding.max_length
    sizes = LayerSizes(
        tokens=positions // (token_shards(mesh) * train.accumulation),
        slots_bound=moe.slots_bound,
        width=stack.d_model,
        hidden=stack.expert_d_ff // mesh["tensor"],
        itemsize=jnp.dtype(stack.dtype).itemsize,
        expert_devices=mesh["expert"],
    )
    return choose_dispatch(plan_spec(moe), stack.execution.capacity_factor, sizes)


def with_dispatch(config: RunConfig, mesh: dict[str, int]) -> RunConfig:
    """The configuration with the dispatch that "auto" is on a mesh with these sizes."""
    choice = auto_choice(config, mesh)
    if choice is None:
        return config
    execution = dataclasses.replace(config.model.stack.execution, dispatch=choice.dispatch)
    return dataclasses.replace(config, model=config.model.with_execution(execution))
