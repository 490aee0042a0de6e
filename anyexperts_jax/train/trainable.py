"""What a run trains, and how fast, by patterns over the names of parameters; see `core.patterns`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.patterns import require_match
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.models.adapters import require_adapted
from anyexperts_jax.models.init import abstract_params, logical_axes, named_leaves
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.distillation import keep_teacher
from anyexperts_jax.train.frozen import train_only
from anyexperts_jax.train.optim import make_optimizer
from anyexperts_jax.train.rates import named_rates


@dataclasses.dataclass(frozen=True)
class Group:
    """The parameters of one pattern. A parameter that several patterns match counts for the first of them."""

    pattern: str
    learning_rate: float | None  # the peak; None: frozen
    tensors: int
    parameters: int


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a run trains.

    Attributes:
      trainable: a tree of bools over the parameters, as `train.frozen` takes it; None: all are trained.
      scales: a tree of each trained parameter's share of `optim.lr`, None where frozen; None: all have `optim.lr`.
      groups: the parameters of each pattern, then the frozen ones.
    """

    trainable: Any
    scales: Any
    groups: tuple[Group, ...]

    @property
    def is_everything(self) -> bool:
        """Whether every parameter is trained at `optim.lr`."""
        return self.trainable is None and self.scales is None

    def optimizer(self, config: RunConfig) -> optax.GradientTransformationExtraArgs:
        """`make_optimizer` for the trained parameters; the optimiser has no state for the others."""
        axes = logical_axes(config.model)
        if self.trainable is not None:  # the mask of weight decay must match what is trained
            axes = jax.tree.map(lambda kept, names: names if kept else None, self.trainable, axes)
        optimizer = make_optimizer(config.optim, axes, self.scales)
        if self.trainable is not None:
            optimizer = train_only(optimizer, self.trainable)
        return keep_teacher(optimizer, self.trainable) if config.train.keeps_start else optimizer

    def table(self) -> TextTable:
        """A row for each pattern: tensors, parameters, share of all parameters, peak learning rate."""
        total = sum(group.parameters for group in self.groups)
        rows = [
            (
                group.pattern if group.learning_rate is not None else "(frozen)",
                str(group.tensors),
                f"{group.parameters:,}",
                f"{group.parameters / total:.2%}",
                "-" if group.learning_rate is None else f"{group.learning_rate:g}",
            )
            for group in self.groups
        ]
        columns = ("pattern", "tensors", "parameters", "share", "learning rate")
        return TextTable(f"What trains, of {total:,} parameters", columns, tuple(rows))

    def record(self) -> dict[str, Any]:
        """The table for metrics.jsonl."""
        return {"groups": [dataclasses.asdict(group) for group in self.groups]}


def what_trains(config: RunConfig) -> Trained:
    """What `train.trainable` and `train.learning_rates` mean for the parameters of the run's model.

    Raises:
      UserError: for a pattern that matches no parameter, or a learning rate for parameters that are frozen.
    """
    require_adapted(config.model)
    train, leaves = config.train, named_leaves(abstract_params(config.model))
    chosen = _matches("train.trainable", train.trainable, leaves)
    rates = named_rates(train.learning_rates)
    apart = _matches("train.learning_rates", rates, leaves)
    trained = set().union(*chosen.values())
    for pattern, names in apart.items():
        require(
            not trained.isdisjoint(names),
            f"train.learning_rates: {pattern!r} matches only parameters that train.trainable leaves frozen",
        )
    own = dict.fromkeys(trained, config.optim.lr)
    for pattern, names in apart.items():  # a later pattern overrides an earlier one
        own.update(dict.fromkeys(set(names) & trained, rates[pattern]))
    structure = jax.tree.structure(abstract_params(config.model))

    def tree(values: list[Any]) -> Any:
        return jax.tree.unflatten(structure, values)

    trainable = None if len(trained) == len(leaves) else tree([name in trained for name in leaves])
    scales = None
    if rates:
        scales = tree([own[name] / config.optim.lr if name in trained else None for name in leaves])
    return Trained(trainable, scales, _groups(chosen, own, leaves))


def _matches(option: str, patterns: Iterable[str], leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    return {pattern: require_match(option, pattern, leaves) for pattern in patterns}


def _groups(
    chosen: Mapping[str, list[str]], rates: Mapping[str, float], leaves: Mapping[str, Any]
) -> tuple[Group, ...]:
    """A group for each pattern and learning rate, and one for the parameters that no pattern matches."""
    left, found = dict(leaves), []
    for pattern, names in chosen.items():
        own = [name for name in names if name in left]
        found += [
            _group(pattern, rate, [left.pop(name) for name in own if rates[name] == rate])
            for rate in sorted({rates[name] for name in own}, reverse=True)
        ]
    if left:
        found.append(_group("", None, list(left.values())))
    return tuple(found)


def _group(pattern: str, rate: float | None, leaves: list[Any]) -> Group:
    return Group(pattern, rate, len(leaves), sum(math.prod(leaf.shape) for leaf in leaves))
