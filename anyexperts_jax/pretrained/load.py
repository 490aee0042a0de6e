"""`load_pretrained` reads a published checkpoint into a `Pretrained`."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from anyexperts_jax.core.devices import require_devices
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.files import parse_json_object, read_text, require_local
from anyexperts_jax.pretrained.extension import with_extension
from anyexperts_jax.pretrained.family import Family, family_of
from anyexperts_jax.pretrained.fp8_blocks import DequantisedBlocks, block_size, without_settings
from anyexperts_jax.pretrained.gguf_file import GgufFile
from anyexperts_jax.pretrained.hub_config import CONFIG, HubConfig
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.read import ReadPlan, plan_reading, read_parameters
from anyexperts_jax.pretrained.sources import SafetensorsFolder, Source

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A published checkpoint on disk, whose weights are not read yet."""

    path: pathlib.Path  # the folder, or the GGUF file
    hub: HubConfig
    name: str  # of the family, in FAMILIES
    family: Family
    source: Source
    generation: Mapping[str, Any]

    def plan(self, mesh: Mesh | None = None) -> ReadPlan:
        """Plans how it is read onto `mesh`, or onto JAX's first device.

        Raises:
          UserError: if config.json and the files do not agree, or the mesh does not divide the sizes.
        """
        return plan_reading(self.family, self.hub, self.source, mesh)


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether `path` looks like a published checkpoint: a GGUF file, or a folder with one or with a hub's config.

    A run has a config.json too; only a hub's names its class or its type of model.
    """
    return path.suffix == ".gguf" or _is_hub_config(path / CONFIG) or len(_ggufs(path)) == 1


def _is_hub_config(path: pathlib.Path) -> bool:
    if not path.is_file():
        return False
    text = path.read_bytes()
    return any(key in text for key in (b'"architectures"', b'"model_type"'))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint: a folder with config.json and safetensors files, a GGUF file, or a folder with one.

    Raises:
      UserError: if there is none, a file is missing or damaged, or its class is not supported.
    """
    place = require_local(path, "checkpoint")
    require(place.exists(), f"checkpoint {place} does not exist")
    if place.is_dir() and not (place / CONFIG).is_file() and len(_ggufs(place)) == 1:
        place = _ggufs(place)[0]
    if place.is_file():
        require(place.suffix == ".gguf", f"checkpoint {place} is no GGUF file; give its folder")
        file = GgufFile.find(place)
        name, family = family_of(file.hub)
        return Checkpoint(place, file.hub, name, family=family, source=file, generation={})
    hub = HubConfig.read(place)
    name, family = family_of(hub)
    block = block_size(hub)
    source: Source = SafetensorsFolder.find(place, eight_bit=block is not None)
    if block is not None:
        source, hub = DequantisedBlocks.of(source, block), without_settings(hub)
    return Checkpoint(place, hub, name, family=family, source=source, generation=read_generation(place))


def read_generation(folder: pathlib.Path) -> dict[str, Any]:
    """Reads a checkpoint's generation_config.json; {} if it has none.

    Raises:
      UserError: if the file is not a JSON object.
    """
    path = folder / GENERATION
    return parse_json_object(read_text(path, GENERATION), str(path)) if path.is_file() else {}


def load_pretrained(path: str | os.PathLike[str], mesh: Mesh | None = None) -> Pretrained:
    """Loads a published model from a folder of safetensors files or from a GGUF file.

    Parameters are read one at a time, straight to their devices, and keep their types; quantised ones become float32,
    or bfloat16 if they are stored as 8-bit floats in blocks. A folder written by `export(form="anyexperts")` gives the
    model with its attached slots or split networks.

    Args:
      mesh: the devices to split the model over, from `make_mesh`; None: JAX's first device.

    Raises:
      UserError: if the checkpoint is damaged or not supported; the message says why.

    Write a model with random weights, and load it:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    >>> shape |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "max_position_embeddings": 32}
    >>> random_model({**shape, "rope_theta": 1e4}).export("tiny")
    >>> ax.load_pretrained("tiny").logits([[1, 2, 3]]).shape
    (1, 3, 64)
    """
    require_devices()
    found = open_checkpoint(path)
    plan = found.plan(mesh)
    params, router_bias_LC = read_parameters(plan, found.source)
    base = Pretrained(
        plan.config,
        params,
        router_bias_LC,
        hub=found.hub,
        family=found.name,
        path=found.path,
        generation=found.generation,
    )
    return with_extension(base, found.path)


def _ggufs(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.gguf")) if folder.is_dir() else []
