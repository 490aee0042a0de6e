"""Weight rules, which map the tensors of a published checkpoint to parts of parameters, for reading and writing.

A rule pairs the name of a parameter with that of a tensor. `expand` turns a family's rules into the *pieces* of a
configuration: a piece pairs one slice of a parameter with a tensor or a part of one. Both directions are checked to be
complete: `check_parameters` refuses rules that make a parameter twice or not at all, and `check_tensors` refuses a
tensor that no rule reads.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, named_leaves
from anyexperts_jax.models.paths import is_moe_layer, layer_place

ROUTER_BIAS = "router_bias"  # [L, C], kept outside the parameters since it has no gradient
Shape = tuple[int, ...]
Layers = Literal["all", "dense", "moe"]
# How the experts of a layer are stored: one tensor each, or stacked as [E, outputs, inputs] or as [E, inputs, outputs].
ExpertLayout = Literal["each", "stacked", "stacked_kernels"]
_SHOWN = 6  # names in an error message


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a tensor become those of a parameter.

    Attributes:
      kind: "same"; "flat" (the tensor has one axis); "kernel" (the tensor is [outputs, inputs] and the parameter
        (*inputs, *outputs)); "batched_kernel" (the same behind a leading axis of experts).
      num_in: number of a kernel's input axes.
      inputs: the input axes of a convolution's tensor; () for one axis.
    """

    kind: Literal["same", "flat", "kernel", "batched_kernel"] = "same"
    num_in: int = 1
    inputs: Shape = ()

    def theirs(self, ours: Shape) -> Shape:
        """Returns the shape of the tensor for a parameter of shape `ours`."""
        if self.kind == "flat":
            return (math.prod(ours),)
        if self.kind == "kernel":
            return (math.prod(ours[self.num_in :]), *(self.inputs or (math.prod(ours[: self.num_in]),)))
        return (*ours[:-2], ours[-1], ours[-2]) if self.kind == "batched_kernel" else ours

    def to_ours(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
        if self.inputs:
            tensor = tensor.reshape(len(tensor), -1)
        return (np.swapaxes(tensor, -1, -2) if "kernel" in self.kind else tensor).reshape(ours)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        if self.kind == "kernel":
            return value.reshape(math.prod(value.shape[: self.num_in]), -1).T.reshape(self.theirs(value.shape))
        return np.swapaxes(value, -1, -2) if self.kind == "batched_kernel" else value.reshape(self.theirs(value.shape))


SAME, FLAT, KERNEL, KERNEL_OF_HEADS = Layout(), Layout("flat"), Layout("kernel"), Layout("kernel", 2)
BATCHED_KERNEL = Layout("batched_kernel")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Pairs a parameter with a tensor.

    Attributes:
      ours: the parameter's name; "{layer}" stands for the prefix of a layer.
      theirs: the tensor's name; "{i}" stands for the index of the layer, "{e}" for that of the expert. If layers come
        in groups of `moe_every`, "{g}" stands for the index of the group and "{j}" for the layer's place in it.
      layers: the layers that the rule is for.
      part: (axis, place) if several parameters are concatenated along an axis of the tensor.
      place: indices into the parameter's first axes, behind that of the layers.
    """

    ours: str
    theirs: str
    layout: Layout = SAME
    layers: Layers = "all"
    part: tuple[int, int] | None = None
    place: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """`parameter[index]` equals, after `layout`, the tensor, or the part of it that `part` selects."""

    parameter: str
    index: tuple[int, ...]
    shape: Shape  # of parameter[index]
    tensor: str
    layout: Layout
    part: tuple[int, int] | None

    @property
    def tensor_shape(self) -> Shape:
        """The shape of the tensor, or of the part."""
        return self.layout.theirs(self.shape)


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that the configuration needs: its shape, and its pieces in order along the axis they share."""

    shape: Shape
    pieces: tuple[Piece, ...]

    def slices(self) -> list[tuple[slice, ...]]:
        """Returns the slice of the tensor that each piece is."""
        if len(self.pieces) == 1 and self.pieces[0].part is None:
            return [()]
        assert self.pieces[0].part is not None
        axis, first, found = self.pieces[0].part[0], 0, []
        for piece in self.pieces:
            stop = first + piece.tensor_shape[axis]
            found.append((*(slice(None),) * axis, slice(first, stop)))
            first = stop
        return found


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the shape and type of every parameter by name, and of the expert biases if the model has them."""
    shapes: dict[str, Any] = named_leaves(abstract_params(config))
    if config.moe.expert_bias and config.stack.num_moe_layers:
        shapes[ROUTER_BIAS] = _Shaped(config.router_bias_shape, np.dtype(np.float32))
    return shapes


@dataclasses.dataclass(frozen=True)
class _Shaped:
    shape: Shape
    dtype: np.dtype


def expand(rules: Sequence[Rule], config: ModelConfig) -> tuple[Piece, ...]:
    """Expands rules into the pieces of a configuration, and checks that they make every parameter exactly once.

    Raises:
      UserError: naming the parameters that no rule makes, or several make.
    """
    shapes = {name: leaf.shape for name, leaf in parameter_shapes(config).items()}
    pieces = tuple(piece for rule in rules for piece in _pieces(rule, config, shapes))
    check_parameters(pieces, shapes)
    return pieces


def _pieces(rule: Rule, config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
    stack = config.stack
    if "{i}" not in rule.theirs and "{g}" not in rule.theirs:
        yield _piece(rule, rule.ours, (), rule.theirs, shapes)
        return
    for layer in range(stack.num_layers):
        moe = is_moe_layer(stack, layer)
        if rule.layers != "all" and moe != (rule.layers == "moe"):
            continue
        prefix, index = layer_place(stack, layer)
        name = rule.ours.format(layer=prefix)
        if rule.ours == ROUTER_BIAS:
            index = ((layer - stack.num_dense_layers) // stack.moe_every,)
        index = (*index, *rule.place)
        group, place = divmod(layer - stack.num_dense_layers, stack.moe_every)
        numbers = {"i": layer, "g": group, "j": place}
        if "{e}" not in rule.theirs:
            yield _piece(rule, name, index, rule.theirs.format(**numbers), shapes)
            continue
        for expert in range(config.moe.num_experts):
            yield _piece(rule, name, (*index, expert), rule.theirs.format(**numbers, e=expert), shapes)


def _piece(rule: Rule, name: str, index: tuple[int, ...], tensor: str, shapes: Mapping[str, Shape]) -> Piece:
    assert name in shapes, f"rule for {name}, which the model does not have"
    return Piece(name, index, shapes[name][len(index) :], tensor=tensor, layout=rule.layout, part=rule.part)


def check_parameters(pieces: Collection[Piece], shapes: Mapping[str, Shape]) -> None:
    """Checks that the pieces make every element of every parameter exactly once.

    Raises:
      UserError: naming the parameters for which they do not.
    """
    made: dict[str, list[tuple[int, ...]]] = {name: [] for name in shapes}
    for piece in pieces:
        made[piece.parameter].append(piece.index)
    wrong = {}
    for name, indices in made.items():
        wanted = math.prod(shapes[name][: len(indices[0])]) if indices else 1
        if len(indices) != wanted or len(set(indices)) != wanted:
            wrong[name] = f"{name} ({len(set(indices))} of {wanted} parts, {len(indices)} times)"
    require(not wrong, f"the weight rules do not make every parameter once: {_some(wrong.values())}")


def expected_tensors(pieces: Collection[Piece]) -> dict[str, Expected]:
    """Returns the tensors that the pieces need, by name."""
    sharing: dict[str, list[Piece]] = {}
    for piece in pieces:
        sharing.setdefault(piece.tensor, []).append(piece)
    found = {}
    for name, own in sharing.items():
        if own[0].part is None:
            assert len(own) == 1, f"{name} is read by {[piece.parameter for piece in own]}, without parts"
            found[name] = Expected(own[0].tensor_shape, tuple(own))
            continue
        own.sort(key=lambda piece: piece.part[1] if piece.part else 0)
        axis, shape = own[0].part[0], list(own[0].tensor_shape)
        shape[axis] = sum(piece.tensor_shape[axis] for piece in own)
        found[name] = Expected(tuple(shape), tuple(own))
    return found


def check_tensors(expected: Mapping[str, Expected], found: Mapping[str, Shape], where: str) -> None:
    """Checks that a checkpoint has exactly the expected tensors, with the expected shapes.

    Args:
      found: shapes by name, without the tensors that the family ignores.
      where: the checkpoint's path, for error messages.

    Raises:
      UserError: naming the tensors that do not fit.
    """
    missing, unused = [n for n in expected if n not in found], [n for n in found if n not in expected]
    if missing or unused:
        faults = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        faults += [f"{len(unused)} that nothing reads: {_some(unused)}"] if unused else []
        raise UserError(f"{where}: the tensors do not fit config.json; {'; '.join(faults)}")
    wrong = [
        f"{name} is {list(found[name])}, config.json wants {list(tensor.shape)}"
        for name, tensor in expected.items()
        if tuple(found[name]) != tensor.shape
    ]
    require(not wrong, f"{where}: {_some(wrong)}")


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    more = len(names) - len(shown)
    return comma_list(shown) + (f" and {more} more" if more else "")
