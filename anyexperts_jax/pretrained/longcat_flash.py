"""LongCat-Flash's MoE blocks (arXiv 2509.01322): the router and experts of one layer. The whole model is not read.

Beside 512 real experts there are 256 zero experts, which return their input. The softmax is over all of them, and a
token's k are chosen by score plus bias. The weights are the scores times a factor, without normalisation, also on zero
experts. Nothing limits how many of the k are zero experts. The two latent attentions and two dense FFNs around the
block are not computed here.
"""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import comma_list, require
from anyexperts_jax.core.files import require_local
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.sources import Reader, SafetensorsFolder
from anyexperts_jax.pretrained.zeda import uncapped

CLASS = "LongcatFlashForCausalLM"
_UNUSED = ("gate_proj", "up_proj")  # of a zero expert
_NAMES = {"w_gate_EDF": "gate_proj", "w_up_EDF": "up_proj", "w_down_EFD": "down_proj"}


class Mixture(NamedTuple):
    """The MoE block of one layer, run by `MoE(config, d_ff).apply({"params": params}, x_BTD, bias_C=bias_C)`."""

    config: AnyExpertsConfig
    d_ff: int
    params: dict[str, dict[str, Array]]
    bias_C: Float[Array, "C"]


def mixture_config(hub: HubConfig) -> AnyExpertsConfig:
    """Reads the routing policy of a LongCat-Flash.

    Raises:
      UserError: for a router with biases on its logits, or zero experts that do not return their input.
    """
    hub.only("zero_expert_type", "identity")
    hub.only("router_bias", False)
    hub.only("hidden_act", "silu")
    experts, zero = hub.num_experts(), hub.whole("zero_expert_num")
    return AnyExpertsConfig.static_top_k(
        experts,
        hub.whole("moe_topk"),
        scores="softmax",
        selection="scores",
        expert_bias=True,
        normalisation="none",
        scaling_factor=hub.number("routed_scaling_factor"),
        virtual_output="identity",
        **(uncapped(experts, zero) if zero else {}),
    )


def load_mixture(path: str | pathlib.Path, layer: int) -> Mixture:
    """Reads the router and the experts of one layer in float32.

    Some files have gate and up matrices of zero experts; they are never used and not read.

    Raises:
      UserError: if the folder has another class, or the layer's tensors do not fit config.json.
    """
    folder = require_local(path, "checkpoint")
    hub = HubConfig.read(folder)
    classes = hub.get("architectures")
    require(classes == [CLASS], f"{hub.where}: architectures={classes} must be [{CLASS}]")
    layers = hub.whole("num_layers")
    require(0 <= layer < layers, f"{hub.where}: layer {layer} is not among its {layers}")
    moe, prefix = mixture_config(hub), f"model.layers.{layer}.mlp."
    source = SafetensorsFolder.find(folder)
    width, d_ff = hub.whole("hidden_size"), hub.whole("expert_ffn_hidden_size")
    wanted = {
        f"{prefix}router.classifier.weight": (moe.num_columns, width),
        f"{prefix}router.e_score_correction_bias": (moe.num_columns,),
    }
    for expert in range(moe.num_experts):
        for ours, theirs in _NAMES.items():
            shape = (width, d_ff) if ours == "w_down_EFD" else (d_ff, width)
            wanted[f"{prefix}experts.{expert}.{theirs}.weight"] = shape
    found = {name: source.tensors[name].shape for name in source.tensors if name.startswith(prefix)}
    zero = range(moe.num_experts, moe.num_columns)
    unused = {f"{prefix}experts.{expert}.{name}.weight" for expert in zero for name in _UNUSED}
    wrong = sorted({*wanted.items()} ^ {(name, shape) for name, shape in found.items() if name not in unused})
    said = comma_list(name for name, _ in wrong[:4])
    require(not wrong, f"{source.where}: the tensors do not fit config.json: {said}")
    with source.opened() as reader:
        router = {"kernel": jnp.asarray(_read(reader, f"{prefix}router.classifier.weight").T)}
        bias_C = jnp.asarray(_read(reader, f"{prefix}router.e_score_correction_bias"))
        experts = {
            ours: jnp.stack([_read(reader, f"{prefix}experts.{e}.{theirs}.weight").T for e in range(moe.num_experts)])
            for ours, theirs in _NAMES.items()
        }
    return Mixture(moe, d_ff, {"router": router, "experts": experts}, bias_C)


def _read(reader: Reader, name: str) -> np.ndarray:
    return reader.read(name).astype(np.float32)
