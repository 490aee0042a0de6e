"""`Family`, which describes one kind of published model, and the choice of a checkpoint's family."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from anyexperts_jax.core.errors import UserError, comma_list, require, shown
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.fp8_blocks import SETTINGS, block_size
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import ExpertLayout, Rule

T = TypeVar("T")


def _ignores_nothing(_: HubConfig) -> tuple[str, ...]:
    return ()


def _unchanged(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values)


@dataclasses.dataclass(frozen=True)
class Family:
    """An entry of `core.registries.FAMILIES`.

    Attributes:
      architectures: the classes of this family, as `architectures` of config.json names them.
      config: turns config.json into the model's configuration; raises UserError for what this package does not support.
      rules: returns the weight rules for a configuration and a layout of the experts in the files.
      model_types: the `model_type`s of this family, needed if another family has a class of the same name.
      ignored: returns patterns of tensors that are not read, such as heads that predict further tokens.
      hub_layout: the layout of the experts in published checkpoints, which an export uses too.
      written: changes config.json for an export that leaves parts of the model out.
    """

    architectures: tuple[str, ...]
    config: Callable[[HubConfig], ModelConfig]
    rules: Callable[[ModelConfig, ExpertLayout], tuple[Rule, ...]]
    ignored: Callable[[HubConfig], tuple[str, ...]] = _ignores_nothing
    model_types: tuple[str, ...] = ()
    hub_layout: ExpertLayout = "each"
    written: Callable[[Mapping[str, Any]], dict[str, Any]] = _unchanged


def family_of(hub: HubConfig) -> tuple[str, Family]:
    """Finds the family of a configuration; returns its name and its entry.

    Raises:
      UserError: if its class is not supported; the message lists the supported ones.
    """
    method = hub.get(SETTINGS)
    if method is not None and block_size(hub) is None:
        name = method.get("quant_method", "unknown") if isinstance(method, Mapping) else shown(method)
        raise UserError(
            f"{hub.where}: the weights are quantised ({name}), which is not read, only fp8 (e4m3) in blocks; "
            "dequantise them first"
        )
    classes = hub.get("architectures")
    known: dict[str, list[str]] = {}
    for name in FAMILIES:
        for cls in FAMILIES[name].architectures:
            known.setdefault(cls, []).append(name)
    named = isinstance(classes, list) and len(classes) == 1 and isinstance(classes[0], str)
    require(named, f"{hub.where}: architectures={shown(classes)} must name one class; supported: {comma_list(known)}")
    assert isinstance(classes, list)
    require(classes[0] in known, f"{hub.where}: class {classes[0]} is not supported, only {comma_list(known)}")
    candidates, kind = known[classes[0]], hub.get("model_type")
    if len(candidates) > 1:
        candidates = [name for name in candidates if kind in FAMILIES[name].model_types]
        require(len(candidates) == 1, f"{hub.where}: class {classes[0]} of model_type={kind!r} is not supported")
    return candidates[0], FAMILIES[candidates[0]]


def without_ignored(family: Family, hub: HubConfig, tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors that the family does not ignore."""
    patterns = [re.compile(pattern) for pattern in family.ignored(hub)]
    return {name: tensor for name, tensor in tensors.items() if not any(p.fullmatch(name) for p in patterns)}


def expert_layout(
    family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str
) -> ExpertLayout:
    """Finds out how the experts of a layer are laid out in the files.

    Args:
      shapes: the shapes of the tensors, by name.
      where: the checkpoint's path, for error messages.

    Raises:
      UserError: if the shapes do not tell which axis is which.
    """
    stacked = [name for name in shapes if name.endswith("experts.gate_up_proj")]
    if not stacked:
        return family.hub_layout
    if family.hub_layout == "each":
        return "stacked"
    width, d_ff = config.stack.d_model, config.stack.expert_d_ff
    down = stacked[0].replace("gate_up_proj", "down_proj")
    said = f"{stacked[0]} is {list(shapes[stacked[0]])}, {down} is {list(shapes.get(down, ()))}"
    require(
        width not in (d_ff, 2 * d_ff),
        f"{where}: {said}: with hidden_size={width} and moe_intermediate_size={d_ff} the shapes do not tell whether "
        "they are inputs by outputs, as published, or outputs by inputs, as transformers 5 writes them: not read",
    )
    return "stacked" if shapes[stacked[0]][1:] == (2 * d_ff, width) else "stacked_kernels"
