"""Describes the run of a published model from its config.json alone, for `anyexperts compile`; reads no weights."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.pretrained.attach import attached_config
from anyexperts_jax.pretrained.family import family_of
from anyexperts_jax.pretrained.fp8_blocks import without_settings
from anyexperts_jax.pretrained.hub_config import CONFIG, HubConfig
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.config_files import with_overrides
from anyexperts_jax.train.published_config import BATCH, LENGTH
from anyexperts_jax.train.strict import build, merge


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots to attach, as in the arguments of `attach`."""

    k_min: float
    k_max: float
    num_virtual: int = 0


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A published model, and the run that would train it.

    Attributes:
      run: trains on text. Where the model reads pictures, it is of the decoder: for text, M-RoPE is a plain rotation.
      model: the whole model, with what the run's overrides changed.
    """

    run: RunConfig
    model: ModelConfig


def is_published_config(source: str) -> bool:
    """Returns whether `source` is a hub's config.json, or a folder that holds one without weights."""
    path = pathlib.Path(source)
    path = path / CONFIG if path.is_dir() else path
    if path.name != CONFIG or not path.is_file():
        return False
    alone = source.endswith(CONFIG) or not any(path.parent.glob("*.safetensors"))
    return alone and b'"architectures"' in path.read_bytes()


def published_run(
    source: str, overrides: Sequence[str] = (), slots: Slots | None = None, *, trains: bool = True
) -> PublishedRun:
    """Returns the run of a published model with the default settings of `anyexperts train`; reads no weights.

    Args:
      source: a hub's config.json, or the folder that holds it.
      overrides: as `load_config` takes them.
      slots: to be attached; None: none.
      trains: whether parameters are float32, as training wants them, or in the type that the file names.

    Raises:
      UserError: a class that is not supported, slots that do not fit it, or an unknown key.
    """
    path = pathlib.Path(source)
    hub = HubConfig.read(path if path.is_dir() else path.parent)
    _, family = family_of(hub)
    hub = without_settings(hub)
    whole = family.config(hub)
    if slots is not None:
        asked = dataclasses.asdict(slots)
        whole = attached_config(whole, **asked)
    dtype = _dtype(hub)
    param_dtype: Dtype = "float32" if trains else dtype
    stack = dataclasses.replace(whole.stack, dtype=dtype, param_dtype=param_dtype)
    rotation = stack.attention.mrope_section
    decoder = dataclasses.replace(
        whole,
        vision_tower=None,
        audio_tower=None,
        stack=dataclasses.replace(stack, attention=dataclasses.replace(stack.attention, mrope_section=None)),
    )
    encoding = {"max_length": min(LENGTH, whole.max_length), "max_patches": 0, "max_frames": 0}
    tables: dict[str, Any] = {
        "model": dataclasses.asdict(decoder),
        "data": {"tokenizer": str(hub.where), "encoding": encoding},
        "train": {"batch_size": BATCH},
    }
    run: RunConfig = build(RunConfig, merge(tables, with_overrides({}, overrides)))
    attention = dataclasses.replace(run.model.stack.attention, mrope_section=rotation)
    model = dataclasses.replace(
        run.model,
        vision_tower=whole.vision_tower,
        audio_tower=whole.audio_tower,
        stack=dataclasses.replace(run.model.stack, attention=attention),
    )
    return PublishedRun(run, model)


def _dtype(hub: HubConfig) -> Dtype:
    """Returns the dtype of the weights that the file names; the default is float32."""
    text = hub.get("text_config", {})
    said = hub.get("dtype", hub.get("torch_dtype", text.get("dtype", text.get("torch_dtype", "float32"))))
    require(isinstance(said, str), f"{hub.where}: dtype must be a name")
    return "bfloat16" if said == "bfloat16" else "float32"
