"""This package's own form of an export: the base model in the hub's layout, and two files with what was added to it.

`anyexperts.json` has the kind of change and the routing policy, `anyexperts.safetensors` the parameters that the base
does not have. Other tools read the folder as the base model; `load_pretrained` reads all of it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, comma_list, one_line, require, require_one_of
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.switches import Switches
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, named_leaves, params_of_leaves
from anyexperts_jax.pretrained.attach import detach, is_attached, on_devices
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.rules import ROUTER_BIAS
from anyexperts_jax.pretrained.sources import require_safetensors
from anyexperts_jax.pretrained.split import added_names, assemble, merge, split_config
from anyexperts_jax.tokenizers.files import as_text

SETTINGS, TENSORS = "anyexperts.json", "anyexperts.safetensors"
_ORDER = "neuron_order"  # [L, F]
Kind = Literal["attached", "split"]


def kind_of(m: Pretrained) -> Kind | None:
    """Whether the model has attached slots or split networks; None: neither. Of both, "split" holds the other."""
    if m.order_LF is not None:
        return "split"
    return "attached" if is_attached(m) else None


def base_of(m: Pretrained) -> Pretrained:
    """Returns the model without attached slots, or with its networks merged: the form that the hub's layout can hold.

    Raises:
      UserError: if nothing was attached or split.
    """
    kind = kind_of(m)
    require(kind is not None, "form='anyexperts' is for a model with attached slots or split networks; use form='hub'")
    return merge(m) if kind == "split" else detach(m)


def write_extension(m: Pretrained, base: Pretrained, folder: pathlib.Path) -> None:
    """Writes the two files into a folder that already holds the base.

    Raises:
      UserError: if the disk is full.
    """
    library = require_safetensors()
    from safetensors.numpy import save_file

    kind, leaves = kind_of(m), named_leaves(m.params)
    if m.order_LF is not None:
        tensors = {**{name: np.asarray(leaves[name]) for name in added_names(m.config)}, _ORDER: m.order_LF}
    else:
        known = named_leaves(base.params)
        tensors = {name: np.asarray(leaf) for name, leaf in leaves.items() if name not in known}
        if m.router_bias_LC is not None:
            tensors[ROUTER_BIAS] = np.asarray(m.router_bias_LC)
    settings = {"kind": kind, "moe": dataclasses.asdict(m.config.moe), "shared": m.config.stack.num_shared_experts}
    (folder / SETTINGS).write_text(as_text(settings), encoding="utf-8")
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / TENSORS)
    except library.SafetensorError as error:
        raise UserError(f"cannot write {TENSORS}: {one_line(error)}; nothing was kept") from error


def extended_config(base: ModelConfig, folder: pathlib.Path) -> ModelConfig:
    """Returns the configuration of the exported model; `base` if the folder holds only the base.

    Reads no weights.

    Raises:
      UserError: if the settings are damaged or do not fit the base.
    """
    settings = _settings(folder)
    if settings is None:
        return base
    moe = _policy(settings["moe"], folder / SETTINGS)
    if settings["kind"] == "split":
        shared = int(settings["shared"])
        base = split_config(base, moe.num_experts + shared, shared, moe.router_markers)
    return dataclasses.replace(base, moe=moe)


def neuron_order(folder: pathlib.Path) -> Int[np.ndarray, "L F"] | None:
    """Reads, for a split model, the index that each neuron had in the dense layer; None: the model was not split.

    Raises:
      UserError: if the order is missing or damaged.
    """
    settings = _settings(folder)
    if settings is None or settings["kind"] != "split":
        return None
    return _take(_tensors(folder), _ORDER, folder)


def with_extension(base: Pretrained, folder: pathlib.Path) -> Pretrained:
    """Returns the exported model; `base` itself if the folder holds only the base.

    Raises:
      UserError: if one of the two files is missing or damaged, or they do not fit the base.
    """
    if not (folder / SETTINGS).is_file():
        return base
    config, tensors = extended_config(base.config, folder), _tensors(folder)
    order_LF = neuron_order(folder)
    if order_LF is not None:
        layers, width = config.stack.num_layers, base.config.stack.d_ff
        fits = order_LF.shape == (layers, width) and (np.sort(order_LF, axis=1) == np.arange(width)[None]).all()
        require(bool(fits), f"{folder / TENSORS}: {_ORDER} is no order of the {width} neurons of {layers} layers")
        added = {name: _take(tensors, name, folder) for name in added_names(config)}
        _require_shapes(added, named_leaves(abstract_params(config)), folder)
        return assemble(base, config, order_LF, added)
    known, wanted = named_leaves(base.params), named_leaves(abstract_params(config))
    new = {name: _take(tensors, name, folder) for name in wanted if name not in known}
    _require_shapes(new, wanted, folder)
    bias_LC = None
    if base.router_bias_LC is not None:
        bias_LC = jax.device_put(jnp.asarray(_take(tensors, ROUTER_BIAS, folder)), base.router_bias_LC.sharding)
    leaves = {**known, **on_devices(config, new, base.placement)}
    return dataclasses.replace(base, config=config, params=params_of_leaves(config, leaves), router_bias_LC=bias_LC)


def _settings(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    if not path.is_file():
        return None
    settings = parse_json_object(read_text(path, SETTINGS), str(path))
    require(
        set(settings) == {"kind", "moe", "shared"}, f"{path} must hold kind, moe and shared; export the model again"
    )
    require_one_of(f"{path}: kind", settings["kind"], ("attached", "split"))
    return settings


def _policy(values: Any, path: pathlib.Path) -> AnyExpertsConfig:
    require(isinstance(values, Mapping) and isinstance(values.get("switches"), Mapping), f"{path}: moe is no policy")
    for cls, given in ((AnyExpertsConfig, values), (Switches, values["switches"])):
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - known)
        require(not unknown, f"{path}: {comma_list(unknown)} of moe are not known; it is of a later version")
    fields: dict[str, Any] = {**values, "switches": Switches(**values["switches"])}
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}  # JSON has no tuples
    return AnyExpertsConfig(**{**fields, **lists})


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    library = require_safetensors()
    from safetensors.numpy import load_file

    require((folder / TENSORS).is_file(), f"{folder} holds {SETTINGS}, but no {TENSORS}; copy that too")
    try:
        return dict(load_file(folder / TENSORS))
    except library.SafetensorError as error:
        raise UserError(f"{folder / TENSORS} cannot be read: {one_line(error)}") from error


def _take(tensors: Mapping[str, np.ndarray], name: str, folder: pathlib.Path) -> np.ndarray:
    require(name in tensors, f"{folder / TENSORS} lacks {name}, which {SETTINGS} asks for")
    return tensors[name]


def _require_shapes(found: Mapping[str, np.ndarray], wanted: Mapping[str, Any], folder: pathlib.Path) -> None:
    for name, value in found.items():
        require(
            value.shape == wanted[name].shape,
            f"{folder / TENSORS}: {name} is {list(value.shape)}, {SETTINGS} wants {list(wanted[name].shape)}",
        )
