"""Exports a model's weights, configuration and tokenizer in the hub's layout, which transformers and servers read."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require, require_one_of
from anyexperts_jax.core.files import require_local, require_printable
from anyexperts_jax.core.quantities import bytes_text
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.calibration import calibration_tokens
from anyexperts_jax.pretrained.card import CARD, card
from anyexperts_jax.pretrained.convert import CONVERSIONS, as_plain, routing_differences
from anyexperts_jax.pretrained.difference import difference
from anyexperts_jax.pretrained.extension import base_of, kind_of, write_extension
from anyexperts_jax.pretrained.family import family_of
from anyexperts_jax.pretrained.hub_config import CONFIG, HubConfig, both_rope_forms
from anyexperts_jax.pretrained.lora import merge_adapter, save_adapter
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.rules import ROUTER_BIAS, Expected, expand, expected_tensors
from anyexperts_jax.pretrained.sources import INDEX, SINGLE, require_safetensors
from anyexperts_jax.routing.policies import IMPORTANCE
from anyexperts_jax.tokenizers.files import as_text
from anyexperts_jax.tokenizers.store import open_tokenizer

FORMS = ("hub", "anyexperts", "adapter", *CONVERSIONS)
SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"
_BESIDE = (  # files that are copied along if the checkpoint has them
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    GENERATION,
)


def export(
    model: Pretrained,
    path: str | os.PathLike[str],
    form: str = "hub",
    *,
    shard_bytes: int = SHARD_BYTES,
    text: str | None = None,
    experts: int | None = None,
) -> None:
    """Writes a model into a new folder: weights, config.json, and the files that came with the checkpoint.

    config.json has the rope settings under their older and newer keys. Everything is written into a temporary folder
    beside `path`, which is renamed when it is complete.

    Args:
      form: "hub": the layout of published checkpoints. "anyexperts", for a model with attached slots or split networks:
        its base in that layout, and the other parameters in files beside it. "adapter": only the low-rank adapter, as
        `pretrained.lora` saves it; all other forms have the adapter merged into the weights. "plain", "zeda" and
        "longcat": the conversions of `pretrained.convert`, in the hub's layout, with a model card that has the measured
        difference of the two models.
      shard_bytes: maximal size of a file; a larger tensor gets a file of its own.
      text: for a conversion, the text on which the difference is measured; None: random ids.
      experts: for form "plain", the experts per token; None: as many as before the model got variable slots.

    Raises:
      UserError: if the folder exists, the disk has too little space, or the layout cannot hold the model.
    """
    require_one_of("form", form, FORMS)
    require(text is None or form in CONVERSIONS, f"text is for form={comma_list(CONVERSIONS)}, not {form!r}")
    require(experts is None or form == "plain", f"experts is for form='plain', not {form!r}")
    out = require_new_folder(path)
    if form == "adapter":
        with _complete_or_nothing(out) as folder:
            save_adapter(model, folder)
        return
    model = merge_adapter(model)
    if form in CONVERSIONS:
        converted = as_plain(model, experts) if form == "plain" else CONVERSIONS[form](model)
        _require_disk(_Tensors.of(converted), out)
        card_text = _write_card(form, model, converted, text)
        with _complete_or_nothing(out) as folder:
            _write_model(converted, folder, shard_bytes)
            (folder / CARD).write_text(card_text, encoding="utf-8")
        return
    kind = kind_of(model)
    require(
        form != "hub" or kind is None,
        f"form='hub' has no place for a model that is {kind}; use form='anyexperts', or "
        f"{'merge' if kind == 'split' else 'detach'} it first",
    )
    policy = model.config.moe.policy
    require(
        policy == IMPORTANCE, f"a checkpoint has no place for the policy {policy!r}; export the model it was put on"
    )
    if form == "hub":
        _require_hub_routing(model)
    base = base_of(model) if form == "anyexperts" else model
    _require_disk(_Tensors.of(base), out)
    with _complete_or_nothing(out) as folder:
        _write_model(base, folder, shard_bytes)
        if form == "anyexperts":
            write_extension(model, base, folder)


def _write_card(form: str, model: Pretrained, converted: Pretrained, text: str | None) -> str:
    tokens_BT = calibration_tokens(model, text, seed=0)
    sample = "drawn at random, which says little about text" if text is None else "of a text that was given"
    return card(form, model, converted, difference(model, converted, tokens_BT), sample)


def _require_hub_routing(model: Pretrained) -> None:
    """Checks that config.json describes the model's routing.

    Raises:
      UserError: naming the fields that differ.
    """
    if model.config.stack.num_moe_layers == 0:
        return
    other = routing_differences(model.config.moe, FAMILIES[model.family].config(model.hub).moe)
    require(
        not other,
        f"form='hub' has no place for how the model routes: {'; '.join(other)}; use form='plain', which is another "
        "function, or form='zeda', where it can express it",
    )


def _require_disk(tensors: "_Tensors", out: pathlib.Path) -> None:
    need, free = tensors.total_bytes, shutil.disk_usage(_nearest_above(out)).free
    require(need < free, f"{out} needs {bytes_text(need)}, but {bytes_text(free)} are free on its disk")


def _write_model(model: Pretrained, folder: pathlib.Path, shard_bytes: int) -> None:
    _write_weights(_Tensors.of(model), folder, shard_bytes)
    write_beside(model.hub, model.path, model.config.stack.param_dtype, folder)


@contextlib.contextmanager
def _complete_or_nothing(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `out`, which is renamed to it at the end, or removed if writing fails."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
        undo.pop_all()


def require_new_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Checks the path of an export, before anything is computed.

    Raises:
      UserError: if it exists, or what it lies in is no folder. Folders that are missing are made when it is written.
    """
    out = require_local(path, "export")
    require_printable(out, "export")
    require(not out.exists(), f"{out} exists; name a new folder")
    above = _nearest_above(out)
    require(above.is_dir(), f"{out} cannot be made: {above} is no folder")
    return out


def _nearest_above(out: pathlib.Path) -> pathlib.Path:
    """Returns the nearest path above `out` that exists."""
    return next(path for path in out.absolute().parents if path.exists())


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensors:
    """The tensors to write, in the order of their parameters."""

    leaves: Mapping[str, Any]
    expected: Mapping[str, Expected]

    @classmethod
    def of(cls, model: Pretrained) -> "_Tensors":
        leaves = named_leaves(model.params)
        if model.router_bias_LC is not None:
            leaves[ROUTER_BIAS] = model.router_bias_LC
        whole = all(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in leaves.values())
        require(whole, "the parameters are spread over several processes; export from one that holds all of them")
        family = FAMILIES[model.family]
        return cls(leaves, expected_tensors(expand(family.rules(model.config, family.hub_layout), model.config)))

    @property
    def total_bytes(self) -> int:
        return sum(self.size(name) for name in self.expected)

    def size(self, name: str) -> int:
        return math.prod(self.expected[name].shape) * self.dtype(name).itemsize

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self.leaves[self.expected[name].pieces[0].parameter].dtype)

    def value(self, name: str) -> np.ndarray:
        tensor = self.expected[name]
        parts = [p.layout.to_theirs(self._on_host(p.parameter)[p.index]) for p in tensor.pieces]
        axis = 0 if tensor.pieces[0].part is None else tensor.pieces[0].part[0]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
        return np.ascontiguousarray(whole)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as one export
    def _on_host(self, parameter: str) -> np.ndarray:
        return np.asarray(self.leaves[parameter])

    def shards(self, most: int) -> Iterator[list[str]]:
        """Yields the names of the tensors of each file."""
        own: list[str] = []
        held = 0
        for name in self.expected:
            if own and held + self.size(name) > most:
                yield own
                own, held = [], 0
            own.append(name)
            held += self.size(name)
        yield own


def _write_weights(tensors: _Tensors, folder: pathlib.Path, shard_bytes: int) -> None:
    library = require_safetensors()
    from safetensors.numpy import save_file

    shards = list(tensors.shards(shard_bytes))
    count = len(shards)
    named = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in zip(named, shards, strict=True):
        try:
            save_file({name: tensors.value(name) for name in names}, folder / file, metadata={"format": "pt"})
        except library.SafetensorError as error:
            raise UserError(f"cannot write {file}: {one_line(error)}; nothing was kept") from error
    if count > 1:
        weight_map = {name: file for file, names in zip(named, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": tensors.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(as_text(index), encoding="utf-8")


def write_beside(hub: HubConfig, source: pathlib.Path, dtype: str, folder: pathlib.Path) -> None:
    """Writes config.json, and copies tokenizer, chat template and settings from `source`.

    Args:
      source: the folder or the GGUF file that the model was read from.
      dtype: type of the weights, written if config.json has none.
    """
    values = both_rope_forms(family_of(hub)[1].written(hub.values))
    if "dtype" not in values and "torch_dtype" not in values:
        values["dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.is_dir():
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    tokenizer = open_tokenizer(str(source))
    tokenizer.save(folder)
    settings = folder / "tokenizer_config.json"
    own = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    settings.write_text(as_text({"tokenizer_class": "PreTrainedTokenizerFast", **own}), encoding="utf-8")
    special = tokenizer.special
    generation = {"bos_token_id": special.bos, "eos_token_id": list(special.eos), "pad_token_id": special.pad}
    known = {key: value for key, value in generation.items() if value is not None}
    (folder / GENERATION).write_text(as_text(known), encoding="utf-8")
