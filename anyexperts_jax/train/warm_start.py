"""Warm start: a run starts from another run's weights, possibly with a new routing configuration.

AnyExperts starts like this from a pretrained mixture with a fixed top-k (arXiv 2511.18314): parameters that the new
routing adds are initialised, all others keep their trained values.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.models.adapters import is_adapter
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, init_leaves, logical_axes, named_leaves, params_of_leaves
from anyexperts_jax.models.paths import is_routing, short_name
from anyexperts_jax.sharding.specs import param_shardings, replicated
from anyexperts_jax.train.config import describe_differences
from anyexperts_jax.train.published import start_of
from anyexperts_jax.train.published_config import is_published
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.run_tokenizer import require_same_tokens
from anyexperts_jax.train.same_run import EXECUTION_KEYS, is_among
from anyexperts_jax.train.strict import differing_keys

# Keys in which the models may differ: how tokens are routed, and how the same values are computed.
_FREE_KEYS = ("moe.", "max_length", "stack.dtype", "stack.lora", "stack.lora.", *EXECUTION_KEYS)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The initial parameters of a run, and which of the other run's parameters were used."""

    params: Any
    router_bias_LC: Float[Array, "L *M C"]
    new: tuple[str, ...]  # parameters that the other run lacks, as a whole or in some columns
    left: tuple[str, ...]  # parameters of the other run that this model does not have

    def describe(self, run_dir: str | pathlib.Path) -> str:
        """One line about the parameters that were kept, are new or were left out."""
        amounts = f"{len(jax.tree.leaves(self.params)) - len(self.new)} parameters kept"
        parts = (("new", self.new), ("left out", self.left))
        told = [f"{what}: {comma_list(map(short_name, names))}" for what, names in parts if names]
        return f"starting from {run_dir}: " + "; ".join([amounts, *told])


def warm_start(
    start: str | pathlib.Path, model: ModelConfig, key: Array, mesh: Mesh, *, data: DataConfig | None = None
) -> WarmStart:
    """Initial parameters of `model` on `mesh` from the last checkpoint of a run, or from a published checkpoint.

    Args:
      key: random key for new parameters.
      data: the data that the model will read; its tokenizer must be that of the other run.

    Raises:
      UserError: if there is no checkpoint, or its model differs in more than its routing.
    """
    try:
        if is_published(start):
            found, params, router_bias_LC = start_of(str(start), model, mesh, data)
        else:
            config, params, router_bias_LC = load_run(start, "last", mesh)
            found = config.model
            if data is not None:
                require_same_tokens(data, config.data, "it")
        return carried_over(params, router_bias_LC, found=found, model=model, key=key, mesh=mesh)
    except UserError as error:
        raise UserError(f"train.start_from={start}: {error}") from error


def carried_over(
    params: Any, router_bias_LC: Float[Array, "L X"], found: ModelConfig, model: ModelConfig, key: Array, mesh: Mesh
) -> WarmStart:
    """Converts `params` of the model `found` to parameters of `model`, which may route differently.

    Routers keep the columns that both models have, real ones first. Additional columns are initialised; additional
    expert biases are 0. Other routing parameters whose shape changes are initialised as a whole.

    Raises:
      UserError: if the models differ in more than their routing.
    """
    differences = {
        name: values
        for name, values in differing_keys(model, found).items()
        if name == "moe.num_experts" or not is_among(name, _FREE_KEYS)
    }
    require(
        not differences,
        f"its model is a different one: {describe_differences(differences)}; only the routing (model.moe except for "
        "num_experts) may differ",
    )
    known, wanted = named_leaves(params), named_leaves(abstract_params(model))
    fits = {name for name, leaf in wanted.items() if name in known and known[name].shape == leaf.shape}
    new = tuple(name for name in wanted if name not in fits)
    wrong = [name for name in new if not (is_routing(name) or is_adapter(name))]
    require(not wrong, f"its parameters do not fit: {', '.join(wrong[:3])}")

    def fresh(key: Array, taken: dict[str, Array], bias_LX: Array) -> tuple[dict[str, Array], Array]:
        drawn = init_leaves(model, key, new)
        drawn |= {name: _with_columns(drawn[name], columns) for name, columns in taken.items()}
        return drawn, _with_columns(jnp.zeros(model.router_bias_shape, jnp.float32), bias_LX)

    shardings = named_leaves(param_shardings(mesh, logical_axes(model), abstract_params(model)))
    places = {name: shardings[name] for name in new}, replicated(mesh)
    taken = {name: known[name] for name in _with_other_columns(model, known)}
    made, bias_LC = jax.jit(fresh, out_shardings=places)(key, taken, router_bias_LC)
    left = tuple(name for name in known if name not in wanted)
    return WarmStart(params_of_leaves(model, {**known, **made}), bias_LC, new, left)


def _with_other_columns(model: ModelConfig, known: Mapping[str, Array]) -> list[str]:
    """The parameters of `model` that differ from `known` only in the number of router columns."""
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda names: isinstance(names, tuple))
    return [
        name
        for (name, leaf), names in zip(named_leaves(abstract_params(model)).items(), axes, strict=True)
        if names[-1:] == ("router",) and name in known
        if known[name].shape[:-1] == leaf.shape[:-1] and known[name].shape != leaf.shape
    ]


def _with_columns(ours: Float[Array, "*rows C"], theirs: Float[Array, "*rows X"]) -> Float[Array, "*rows C"]:
    """`ours` with the columns (along the last axis) that `theirs` has replaced by its values."""
    columns = min(ours.shape[-1], theirs.shape[-1])
    return ours.at[..., :columns].set(theirs[..., :columns])
