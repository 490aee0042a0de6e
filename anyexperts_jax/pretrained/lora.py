"""Low-rank adapters of published models: merge them into the weights, unmerge, save and load them.

A saved adapter is a folder. `anyexperts_adapter.json` has its settings and the fingerprint of its base, and
`anyexperts_adapter.safetensors` all factors under this package's names. `adapter_config.json` and
`adapter_model.safetensors` hold, for `peft`, the factors of those weights that are a linear layer in transformers;
stacked experts are not.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.models.adapters import adapted_weights, added, factors, is_adapter, without_adapters
from anyexperts_jax.models.init import abstract_params, named_leaves, params_of_leaves
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.pretrained.attach import on_devices
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.rules import Piece, expand
from anyexperts_jax.pretrained.sources import require_safetensors
from anyexperts_jax.tokenizers.files import as_text

SETTINGS, TENSORS = "anyexperts_adapter.json", "anyexperts_adapter.safetensors"
PEFT_SETTINGS, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_SAMPLE = 4096  # about how many elements of each parameter the fingerprint reads


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter without its base model."""

    config: LoraConfig
    leaves: Mapping[str, Any]  # the factors by name
    base: str  # fingerprint of the parameters it was trained on


def fingerprint(m: Pretrained) -> str:
    """Hashes evenly spaced elements of each parameter but the adapters, as float32 whatever their type."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(m.params).items()):
        if not is_adapter(name):
            flat = leaf.reshape(-1)[:: max(1, leaf.size // _SAMPLE)]
            digest.update(f"{name} {leaf.shape}".encode())
            digest.update(np.asarray(flat).astype(np.float32).tobytes())
    return digest.hexdigest()[:32]


def adapter_of(m: Pretrained) -> Adapter:
    """Extracts a model's adapter.

    Raises:
      UserError: if it has none.
    """
    lora = m.config.stack.lora
    require(lora is not None, f"the model of {m.path} has no adapter: model.stack.lora was not set when it was trained")
    assert lora is not None
    return Adapter(lora, {n: leaf for n, leaf in named_leaves(m.params).items() if is_adapter(n)}, fingerprint(m))


def with_adapter(m: Pretrained, adapter: Adapter) -> Pretrained:
    """Adds an adapter to a model, beside its weights.

    Raises:
      UserError: if the model has an adapter already, or the adapter was trained on another base.
    """
    return with_adapters(m, {"": adapter})[""]


def with_adapters(m: Pretrained, adapters: Mapping[str, Adapter]) -> dict[str, Pretrained]:
    """Returns the model with each of the adapters, by name; to switch, take another entry.

    All entries share the arrays of `m`; only the factors are their own. Adapters of equal settings share compiled
    programs.

    Raises:
      UserError: if the model has an adapter already, or one of these was trained on another base.
    """
    require(m.config.stack.lora is None, "the model has an adapter already; merge that first")
    found = fingerprint(m) if adapters else ""
    for name, adapter in adapters.items():
        require(
            found == adapter.base,
            f"the adapter {f'{name} ' if name else ''}was trained on another base: its fingerprint is {adapter.base}, "
            f"that of {m.path} is {found}",
        )
    return {name: _with_factors(m, adapter) for name, adapter in adapters.items()}


def merge_adapter(m: Pretrained) -> Pretrained:
    """Adds a model's adapter to its weights; a model without one is returned unchanged."""
    if m.config.stack.lora is None:
        return m
    leaves = named_leaves(m.params)
    config = without_adapters(m.config)
    values = on_devices(config, {**leaves, **added(m.config, leaves)}, m.placement)
    return dataclasses.replace(m, config=config, params=params_of_leaves(config, values))


def unmerge_adapter(merged: Pretrained, adapter: Adapter) -> Pretrained:
    """Inverts `merge_adapter`, up to rounding: subtracts the adapter from the weights and puts it beside them."""
    m = _with_factors(merged, adapter)
    leaves = named_leaves(m.params)
    values = on_devices(m.config, {**leaves, **added(m.config, leaves, -1)}, m.placement)
    return dataclasses.replace(m, params=params_of_leaves(m.config, values))


def _with_factors(m: Pretrained, adapter: Adapter) -> Pretrained:
    config = dataclasses.replace(m.config, stack=dataclasses.replace(m.config.stack, lora=adapter.config))
    wanted = {name: leaf for name, leaf in named_leaves(abstract_params(config)).items() if is_adapter(name)}
    lacking = [name for name in wanted if name not in adapter.leaves]
    require(not lacking, f"the adapter lacks {comma_list(lacking[:3])}, which its patterns ask for")
    for name, leaf in wanted.items():
        shape = tuple(adapter.leaves[name].shape)
        require(shape == leaf.shape, f"the adapter's {name} is {list(shape)}, the model wants {list(leaf.shape)}")
    own = on_devices(config, {name: adapter.leaves[name] for name in wanted}, m.placement)
    return dataclasses.replace(m, config=config, params=params_of_leaves(config, {**named_leaves(m.params), **own}))


def save_adapter(m: Pretrained, folder: pathlib.Path) -> list[str]:
    """Writes a model's adapter into an empty folder; returns the adapted weights that `peft` has no layer for.

    Raises:
      UserError: if the model has no adapter, or the disk is full.
    """
    library = require_safetensors()
    from safetensors.numpy import save_file

    adapter = adapter_of(m)
    settings = {**dataclasses.asdict(adapter.config), "base": adapter.base}
    tensors = {name: np.ascontiguousarray(np.asarray(leaf, np.float32)) for name, leaf in adapter.leaves.items()}
    peers, without = peft_tensors(m)
    try:
        (folder / SETTINGS).write_text(as_text(settings), encoding="utf-8")
        save_file(tensors, folder / TENSORS)
        if peers:
            (folder / PEFT_SETTINGS).write_text(as_text(_peft_settings(m, adapter.config, peers)), encoding="utf-8")
            save_file(peers, folder / PEFT_TENSORS, metadata={"format": "pt"})
    except library.SafetensorError as error:
        raise UserError(f"cannot write the adapter into {folder}: {one_line(error)}") from error
    return without


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter that `save_adapter` wrote.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    library = require_safetensors()
    from safetensors.numpy import load_file

    folder = pathlib.Path(path)
    for name in (SETTINGS, TENSORS):
        require((folder / name).is_file(), f"adapter {folder} has no {name}; give a folder of export --form adapter")
    settings = parse_json_object(read_text(folder / SETTINGS, SETTINGS), str(folder / SETTINGS))
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    require(set(settings) == {*names, "base"}, f"{folder / SETTINGS} must hold {comma_list(sorted(names))} and base")
    try:
        config = LoraConfig(**{name: _tuple(settings[name]) for name in names})
        return Adapter(config, dict(load_file(folder / TENSORS)), str(settings["base"]))
    except UserError as error:
        raise UserError(f"{folder / SETTINGS}: {error}") from error
    except library.SafetensorError as error:
        raise UserError(f"{folder / TENSORS} cannot be read: {one_line(error)}") from error


def peft_tensors(m: Pretrained) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the factors with `peft`'s names and shapes, and the adapted weights that it has no layer for."""
    leaves, tensors, without = named_leaves(m.params), {}, []
    pieces = _pieces_of(m)
    for weight in adapted_weights(m.config):
        own = pieces.get(weight, [])
        if not own:
            without.append(weight)
            continue
        a, b = (np.asarray(factor, np.float32) for factor in factors(m.config, leaves, weight))
        for piece in own:
            layer = f"base_model.model.{piece.tensor.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(a[piece.index].T)
            tensors[f"{layer}.lora_B.weight"] = np.ascontiguousarray(b[piece.index].T)
    return tensors, without


def _pieces_of(m: Pretrained) -> dict[str, list[Piece]]:
    """Returns, by parameter, the pieces of those weights that are a linear layer in transformers."""
    config = dataclasses.replace(without_adapters(m.config), moe=FAMILIES[m.family].config(m.hub).moe)
    if m.order_LF is not None:
        return {}  # the weights of a split model are parts of the base's linear layers
    found: dict[str, list[Piece]] = {}
    family = FAMILIES[m.family]
    for piece in expand(family.rules(config, family.hub_layout), config):
        if piece.layout.kind == "kernel" and piece.part is None and piece.parameter.endswith("/kernel"):
            found.setdefault(piece.parameter, []).append(piece)
    return found


def _peft_settings(m: Pretrained, lora: LoraConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    ending = ".lora_A.weight"
    layers = [n.removeprefix("base_model.model.").removesuffix(ending) for n in tensors if n.endswith(ending)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(m.hub.get("_name_or_path", "")),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
