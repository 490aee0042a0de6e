"""Plain upcycling: makes a published MoE model from a published dense one; its experts are copies of the networks.

The result has a class that other tools know: Llama's decoder with experts is Mixtral, Qwen3's is Qwen3-MoE. So it can
be written in the hub's layout, and `anyexperts train` accepts it like any other checkpoint.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.evolution.config import EvolveRun, ExpertInit, UpcycleConfig, upcycled_model
from anyexperts_jax.evolution.upcycle import upcycle_params
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.hub_config import HubConfig, keys
from anyexperts_jax.pretrained.load import open_checkpoint
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.write import write_beside
from anyexperts_jax.train.published_config import is_published
from anyexperts_jax.train.run_dir import RunDir


def upcycle(
    m: Pretrained,
    *,
    num_experts: int = 4,
    experts_per_token: int = 2,
    moe_every: int = 1,
    num_dense_layers: int = 0,
    init: ExpertInit = "copy",
    seed: int = 0,
) -> Pretrained:
    """Makes an MoE model from a dense one: every expert is a copy of the layer's network.

    A token's weights sum to one, so with `init="copy"` the first forward pass equals the dense model's up to rounding,
    whatever the router chooses. The router is random. With one expert per token the weight is always 1, and only the
    balance loss trains the router.

    Args:
      m: a dense model of Llama's or Qwen3's class.
      num_experts: experts per layer, each as wide as the dense network.
      experts_per_token: how many of them a token gets.
      moe_every, num_dense_layers: which layers of Qwen3 get experts: leading dense layers, then every n-th. Mixtral has
        experts in all layers.
      init: how the experts differ from the network at the start; see `evolution.config.UpcycleConfig`.
      seed: seed of the router and of `init`.

    Raises:
      UserError: if the model has experts, has another class or biases that the MoE class lacks, or its layers do not
        fit the pattern.

    Upcycle a dense model with random weights:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    >>> shape |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "max_position_embeddings": 32}
    >>> mixture = ax.upcycle(random_model({**shape, "rope_theta": 1e4}), num_experts=4)
    >>> mixture.family, mixture.config.moe.num_experts, mixture.config.moe.k_max
    ('mixtral', 4, 2)
    """
    require(m.config.stack.num_moe_layers == 0, "upcycle: the model has experts already; a dense one is needed")
    require(m.order_LF is None, "upcycle: the model was split; merge it first")
    require(1 <= experts_per_token <= num_experts, f"upcycle: {experts_per_token} of {num_experts} experts a token")
    wanted = UpcycleConfig(num_experts, moe_every, num_dense_layers, init)
    family, hub = mixture_of(m.config, m.family, m.hub, wanted, experts_per_token)
    read: ModelConfig = FAMILIES[family].config(hub)
    stack = read.stack
    pattern = dataclasses.replace(wanted, moe_every=stack.moe_every, num_dense_layers=stack.num_dense_layers)
    config = upcycled_model(m.config, pattern, read.moe)
    if stack.num_dense_layers == 0 and stack.moe_every == 1:  # no dense layer is left, and config.json lacks its width
        config = dataclasses.replace(config, stack=dataclasses.replace(config.stack, d_ff=stack.d_ff))
    params = upcycle_params(m.params, config, pattern, jax.random.key(seed), m.placement.mesh)
    return dataclasses.replace(m, config=config, params=params, hub=hub, family=family)


def mixture_of(
    dense: ModelConfig, family: str, hub: HubConfig, wanted: UpcycleConfig, experts_per_token: int
) -> tuple[str, HubConfig]:
    """Returns the family and the config.json of the published class that a dense model with experts has.

    Raises:
      UserError: if there is no such class.
    """
    require(family in _TARGETS, f"upcycle: family {family} has no class with experts here, only {comma_list(_TARGETS)}")
    target, own = _TARGETS[family](dense, wanted)
    values = {key: value for key, value in hub.values.items() if key not in _WRITTEN_ANEW}
    return target, HubConfig({**values, **own, "num_experts_per_tok": experts_per_token}, hub.where)


def keep_mixture(run: EvolveRun, stage: pathlib.Path, note: Callable[[str], None]) -> None:
    """Writes the folder "base" of a stage with experts, if the run starts from a published dense checkpoint.

    With it `train.published.load_tuned` reads the stage as a published MoE model. If no published class has such
    experts, `note` is called with the reason, and the stage is only a run.
    """
    start, folder = run.base.train.start_from, RunDir(stage).base
    if start is None or folder.is_dir() or not is_published(start):
        return
    found = open_checkpoint(start)
    dense, slots = found.plan().config, run.evolve.moe.slots_bound
    try:
        _, hub = mixture_of(dense, found.name, found.hub, run.evolve.upcycle, slots)
    except UserError as error:
        note(f"{stage} is not written as a published mixture: {error}")
        return
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_beside(hub, found.path, dense.stack.param_dtype, fresh)
    fresh.rename(folder)


_WRITTEN_ANEW = keys(  # keys of config.json that a dense model does not have, ignores, or has with another value
    """
    attention_bias decoder_sparse_step layer_types mlp_bias mlp_only_layers model_type moe_intermediate_size
    n_routed_experts norm_topk_prob num_experts num_experts_per_tok num_local_experts pretraining_tp
    """
)


def _mixtral(dense: ModelConfig, wanted: UpcycleConfig) -> tuple[str, dict[str, Any]]:
    stack = dense.stack
    biased = stack.attention.qkv_bias or stack.attention.out_bias or stack.mlp_bias
    require(not biased, "upcycle: the model has biases, and Mixtral, Llama's class with experts, has none")
    everywhere = wanted.moe_every == 1 and wanted.num_dense_layers == 0
    require(
        everywhere, "upcycle: Mixtral, Llama's class with experts, has them in every layer: moe_every=1, none dense"
    )
    return "mixtral", {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": wanted.num_experts,
        "head_dim": stack.attention.head_dim,
        "num_key_value_heads": stack.attention.num_kv_heads,
        "rms_norm_eps": stack.norm_eps,
        "sliding_window": None,
    }


def _qwen3_moe(dense: ModelConfig, wanted: UpcycleConfig) -> tuple[str, dict[str, Any]]:
    stack, every, first = dense.stack, wanted.moe_every, wanted.num_dense_layers
    fits = first < stack.num_layers and first % every == 0 and stack.num_layers % every == 0
    require(
        fits,
        f"upcycle: moe_every={every} must divide the model's {stack.num_layers} layers and num_dense_layers={first}, "
        "which must leave some",
    )
    return "qwen3_moe", {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": wanted.num_experts,
        "moe_intermediate_size": stack.d_ff,
        "norm_topk_prob": True,
        "decoder_sparse_step": every,
        "mlp_only_layers": list(range(first)),
        "attention_bias": stack.attention.qkv_bias,
    }


_TARGETS: dict[str, Callable[[ModelConfig, UpcycleConfig], tuple[str, dict[str, Any]]]] = {
    "llama": _mixtral,
    "qwen3": _qwen3_moe,
}
