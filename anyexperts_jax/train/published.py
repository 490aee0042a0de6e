"""Runs that start from a published checkpoint: their initial parameters, the files they keep, and their export.

The run's folder "base" has everything of the checkpoint except its weights. With it, `load_tuned` turns the run's
weights into a published model, which generates from any text and can be exported in the checkpoint's own format.
"""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anyexperts_jax.core.errors import require
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, named_leaves, params_of_leaves
from anyexperts_jax.pretrained.base_folder import keep_base
from anyexperts_jax.pretrained.extension import neuron_order
from anyexperts_jax.pretrained.family import family_of
from anyexperts_jax.pretrained.fp8_blocks import without_settings
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.load import load_pretrained, read_generation
from anyexperts_jax.pretrained.lora import read_adapter, with_adapter
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.sharding.specs import replicated
from anyexperts_jax.train.published_config import is_published
from anyexperts_jax.train.run_dir import RunDir, load_checkpoint
from anyexperts_jax.train.run_tokenizer import require_same_tokens


def start_of(
    checkpoint: str, model: ModelConfig, mesh: Mesh, data: DataConfig | None
) -> tuple[ModelConfig, Any, jax.Array]:
    """Configuration, parameters and expert biases [L, C] of a checkpoint, with the dtypes and special ids of `model`.

    Raises:
      UserError: if it cannot be read, or its tokenizer is not that of `data`.
    """
    read = load_pretrained(checkpoint, mesh)
    if data is not None:
        own = read.tokenizer
        theirs = dataclasses.replace(data, tokenizer=str(checkpoint), token_fingerprint=own.fingerprint)
        require_same_tokens(data, theirs, "it")
    stack = dataclasses.replace(read.config.stack, param_dtype=model.stack.param_dtype)
    config = dataclasses.replace(read.config, stack=stack, pad_id=model.pad_id, eos_id=model.eos_id)
    types = named_leaves(abstract_params(config))
    leaves = {name: leaf.astype(types[name].dtype) for name, leaf in named_leaves(read.params).items()}
    bias_LC = read.router_bias_LC
    if bias_LC is None:
        bias_LC = jax.device_put(np.zeros(config.router_bias_shape, np.float32), replicated(mesh))
    return config, params_of_leaves(config, leaves), bias_LC


def keep_start(start_from: str | None, paths: RunDir) -> None:
    """Writes the folder "base" of a run that starts from a published checkpoint, or from a run that did. An existing
    folder is left alone.

    Raises:
      UserError: if the checkpoint cannot be read.
      OSError: if the folder cannot be written.
    """
    if start_from is None or paths.base.is_dir():
        return
    if is_published(start_from):
        keep_base(pathlib.Path(start_from), paths.base)
    elif is_tuned(start_from):
        shutil.copytree(RunDir(pathlib.Path(start_from)).base, paths.base)


def is_tuned(run_dir: str | os.PathLike[str]) -> bool:
    """Whether a run started from a published checkpoint."""
    return (pathlib.Path(run_dir) / "base" / "config.json").is_file()


def load_tuned(run_dir: str | os.PathLike[str], which: str = "best", mesh: Mesh | None = None) -> Pretrained:
    """Loads a run that started from a published checkpoint as a published model, to generate from text or to export it.

    Raises:
      UserError: if the run did not start from a published checkpoint, or has no checkpoint itself.
    """
    paths = RunDir(pathlib.Path(run_dir))
    require(is_tuned(paths.root), f"{paths.root} did not start from a published checkpoint: there is no {paths.base}")
    found = load_checkpoint(paths.root, which, mesh)
    model, read = found.config.model, without_settings(HubConfig.read(paths.base))
    others = {key: value for key, value in read.values.items() if key != "torch_dtype"}
    hub = HubConfig({**others, "dtype": model.stack.param_dtype}, read.where)
    biased = model.moe.expert_bias and model.stack.num_moe_layers > 0
    return Pretrained(
        model,
        found.params,
        found.router_bias_LC if biased else None,
        hub=hub,
        family=family_of(hub)[0],
        path=paths.base,
        generation=read_generation(paths.base),
        order_LF=neuron_order(paths.base),
    )


def load_published(
    path: str | os.PathLike[str],
    which: str = "best",
    mesh: Mesh | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
) -> Pretrained:
    """Loads a published checkpoint, or a run that started from one.

    Args:
      which: of a run, "best" or "last".
      adapter: a folder of `export --form adapter` to put beside the weights; None: none.

    Raises:
      UserError: if the path leads to neither, or cannot be read, or the adapter was trained on another base.
    """
    beside = None if adapter is None else read_adapter(adapter)  # before gigabytes are read
    model = load_tuned(path, which, mesh) if is_tuned(path) else load_pretrained(path, mesh)
    return model if beside is None else with_adapter(model, beside)
