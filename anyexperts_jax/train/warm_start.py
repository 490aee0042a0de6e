"""Starting from another run: its parameters go on under a routing policy that may be another.

As AnyExperts starts from a pretrained mixture with a fixed top-k (arXiv 2511.18314): what the policy adds is new, and
everything else is as it was learned.
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
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, init_leaves, logical_axes, named_leaves, params_of_leaves
from anyexperts_jax.models.paths import is_routing, short_name
from anyexperts_jax.sharding.specs import param_shardings, replicated
from anyexperts_jax.train.config import describe_differences
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.run_tokenizer import require_same_tokens
from anyexperts_jax.train.same_run import EXECUTION_KEYS, is_among
from anyexperts_jax.train.strict import differing_keys

# What another model may have another of: how tokens are routed, and how the same values are computed.
_FREE_KEYS = ("moe.", "max_length", "stack.dtype", *EXECUTION_KEYS)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What a run starts with, and what became of the other run's parameters."""

    params: Any
    router_bias_LC: Float[Array, "L C"]
    new: tuple[str, ...]  # parameters, or columns of them, that the other run has not
    left: tuple[str, ...]  # the other run's, which this model has no use for

    def describe(self, run_dir: str | pathlib.Path) -> str:
        """One line of what goes on and what is new."""
        amounts = f"{len(jax.tree.leaves(self.params)) - len(self.new)} parameters go on"
        parts = (("new", self.new), ("left out", self.left))
        told = [f"{what}: {comma_list(map(short_name, names))}" for what, names in parts if names]
        return f"starting from {run_dir}: " + "; ".join([amounts, *told])


def warm_start(
    run_dir: str | pathlib.Path, model: ModelConfig, key: Array, mesh: Mesh, *, data: DataConfig | None = None
) -> WarmStart:
    """The last checkpoint of the run in `run_dir`, made into parameters of `model` on `mesh`.

    Args:
      key: of what is new.
      data: what the model is to read; its tokenizer must be the other run's.

    Raises:
      UserError: when there is no checkpoint, or its model differs in more than how it routes.
    """
    config, params, router_bias_LC = load_run(run_dir, "last", mesh)
    try:
        if data is not None:
            require_same_tokens(data, config.data, "it")
        return carried_over(params, router_bias_LC, found=config.model, model=model, key=key, mesh=mesh)
    except UserError as error:
        raise UserError(f"train.start_from={run_dir}: {error}") from error


def carried_over(
    params: Any, router_bias_LC: Float[Array, "L X"], found: ModelConfig, model: ModelConfig, key: Array, mesh: Mesh
) -> WarmStart:
    """`params` of a model `found` as those of `model`, which routes differently.

    Routers keep the columns that both have, real ones first; a column more is drawn anew, an expert bias more is 0.
    What else of the routing has another shape is drawn anew as a whole.

    Raises:
      UserError: when the two differ in more than that.
    """
    differences = {
        name: values
        for name, values in differing_keys(model, found).items()
        if name == "moe.num_experts" or not is_among(name, _FREE_KEYS)
    }
    require(
        not differences,
        f"its model is another one: {describe_differences(differences)}; only how it routes (model.moe but for "
        "num_experts) may differ",
    )
    known, wanted = named_leaves(params), named_leaves(abstract_params(model))
    fits = {name for name, leaf in wanted.items() if name in known and known[name].shape == leaf.shape}
    new = tuple(name for name in wanted if name not in fits)
    wrong = [name for name in new if not is_routing(name)]
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
    """The parameters of `model` that differ from `known` in the number of the router's columns and in nothing else."""
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda names: isinstance(names, tuple))
    return [
        name
        for (name, leaf), names in zip(named_leaves(abstract_params(model)).items(), axes, strict=True)
        if names[-1:] == ("router",) and name in known
        if known[name].shape[:-1] == leaf.shape[:-1] and known[name].shape != leaf.shape
    ]


def _with_columns(ours: Float[Array, "*rows C"], theirs: Float[Array, "*rows X"]) -> Float[Array, "*rows C"]:
    """`ours` with the columns, along the last axis, that `theirs` has too."""
    columns = min(ours.shape[-1], theirs.shape[-1])
    return ours.at[..., :columns].set(theirs[..., :columns])
