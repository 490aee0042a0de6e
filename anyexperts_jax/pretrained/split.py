"""`split` cuts the dense networks of a published model into experts, without copies; `merge` joins them again."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.core.errors import comma_list, require, require_one_of
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, named_leaves, params_of_leaves
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import MOE_LAYERS, dense_name, dense_twins, expert_weight
from anyexperts_jax.pretrained.attach import on_devices
from anyexperts_jax.pretrained.calibration import calibration_tokens
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.neurons import Groups, Method, Network, group_neurons
from anyexperts_jax.pretrained.split_policy import split_policy

ROUTER_NAMES = (f"{MOE_LAYERS}moe/router/gate_kernel", f"{MOE_LAYERS}moe/router/up_kernel")
_CUT = (
    "num_dense_layers",
    "moe_every",
    "expert_d_ff",
    "num_shared_experts",
)  # fields of StackConfig that split changes
_SHARED = f"{MOE_LAYERS}moe/shared/"


def split(
    m: Pretrained,
    *,
    num_experts: int,
    num_shared: int = 0,
    text: str | Sequence[Sequence[int]] | None = None,
    method: Method = "activations",
    markers: int = 4,
    seed: int = 0,
) -> Pretrained:
    """Cuts every dense network into `num_experts` experts, of which `num_shared` serve every token.

    An expert is a group of the network's own neurons, and its output has weight 1. With all experts on, which is the
    model's own budget, the output equals the dense model's up to the order of summation. `budget` counts a token's
    experts without the shared ones. The router is not trained: it ranks experts by the estimated norms of their outputs
    (`routing.routers.markers`).

    Args:
      m: a dense model.
      num_experts: number of groups of neurons, including the shared ones; must divide the network's width.
      num_shared: number of groups that serve every token.
      text: the sample on which activations are compared: a text, or rows of ids of equal length. None: random ids,
        which say little about real text.
      method: "activations", by the tokens on which neurons are active; or a baseline, "random" or "contiguous".
      markers: how many neurons of an expert the router uses to estimate its output.
      seed: seed of random ids and groups.

    Raises:
      UserError: if the model has experts or biases in its networks, or `num_experts` does not divide their width.

    Cut a model with random weights into 6 experts, one of them shared:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    >>> shape |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "max_position_embeddings": 32}
    >>> parts = ax.split(random_model({**shape, "rope_theta": 1e4}), num_experts=6, num_shared=1)
    >>> parts.config.moe.num_experts, parts.config.stack.expert_d_ff
    (5, 4)
    """
    config = split_config(m.config, num_experts, num_shared, markers)
    require_one_of("method", method, get_args(Method))
    inputs = _network_inputs(m, calibration_tokens(m, text, seed))
    leaves = named_leaves(m.params)
    found = []
    how: dict[str, Any] = {"markers": markers, "method": method, "seed": seed}
    for layer, x_ND in enumerate(inputs):
        weights = (np.asarray(leaves[name], np.float32) for name in _dense_kernels(layer))
        found.append(group_neurons(Network(x_ND, *weights), num_experts, num_shared, **how))
    order_LF = np.stack([groups.order_F for groups in found]).astype(np.int32)
    return assemble(m, config, order_LF, _router_leaves(leaves, found))


def merge(m: Pretrained) -> Pretrained:
    """Returns the dense model that `m` was split from. The experts' weights are put back unchanged; attached slots are
    removed.

    Raises:
      UserError: if the model was not split.

    Split a model with random weights, and merge it again:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    >>> shape |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "max_position_embeddings": 32}
    >>> parts = ax.split(random_model({**shape, "rope_theta": 1e4}), num_experts=6)
    >>> ax.merge(parts).config.stack.num_moe_layers
    0
    """
    require(m.order_LF is not None, "merge: the model was not made by split")
    assert m.order_LF is not None
    config = merged_config(m)
    leaves, dense = named_leaves(m.params), {}
    for name in leaves:
        if not name.startswith(MOE_LAYERS):
            dense[name] = leaves[name]
        elif expert_weight(name) is None:
            for layer, twin in enumerate(dense_twins(m.config, name)):
                dense[twin] = leaves[name][layer]
    for weight, parts in _parts(leaves, m.config.stack.num_shared_experts).items():
        axis = 1 if weight == "down" else 2
        whole_LXY = np.concatenate(parts, axis=axis)
        for layer, order_F in enumerate(m.order_LF):
            back_F = np.argsort(order_F)
            dense[dense_name(layer, f"mlp/{weight}/kernel")] = np.take(whole_LXY[layer], back_F, axis=axis - 1)
    values = on_devices(config, dense, m.placement)
    return dataclasses.replace(m, config=config, params=params_of_leaves(config, values), order_LF=None)


def split_config(config: ModelConfig, num_experts: int, num_shared: int, markers: int) -> ModelConfig:
    """Returns the configuration of the split model.

    Raises:
      UserError: as for `split`.
    """
    stack = config.stack
    require(stack.num_moe_layers == 0, "split: the model has experts already; a dense one is needed")
    require(not stack.mlp_bias, "split: the model's networks have biases, which experts do not")
    require(
        0 <= num_shared < num_experts,
        f"split: num_shared={num_shared} must be from 0 to below num_experts={num_experts}",
    )
    fitting = [n for n in range(2, stack.d_ff + 1) if stack.d_ff % n == 0]
    require(
        stack.d_ff % num_experts == 0,
        f"split: num_experts={num_experts} must divide the network's width {stack.d_ff}: {comma_list(fitting[:12])}",
    )
    require(markers >= 1, f"split: markers={markers} must be >= 1")
    moe = split_policy(num_experts - num_shared, markers)
    fields: dict[str, Any] = {"num_dense_layers": 0, "moe_every": 1, "expert_d_ff": stack.d_ff // num_experts}
    return dataclasses.replace(
        config, moe=moe, stack=dataclasses.replace(stack, num_shared_experts=num_shared, **fields)
    )


def merged_config(m: Pretrained) -> ModelConfig:
    """Returns the dense configuration of a split model, with the layers and the policy that config.json describes."""
    base = FAMILIES[m.family].config(m.hub)
    own = {name: getattr(base.stack, name) for name in _CUT}
    return dataclasses.replace(m.config, moe=base.moe, stack=dataclasses.replace(m.config.stack, **own))


def added_names(config: ModelConfig) -> list[str]:
    """Returns the names of a split model's parameters that the dense one lacks: of routers and slots."""
    names = named_leaves(abstract_params(config))
    return [name for name in names if not dense_twins(config, name) and not name.startswith(_SHARED)]


def assemble(
    m: Pretrained, config: ModelConfig, order_LF: Int[np.ndarray, "L F"], added: Mapping[str, Any]
) -> Pretrained:
    """Builds a split model from a dense one, the order of its neurons and the parameters of `added_names`."""
    leaves = named_leaves(m.params)
    routed, shared = config.moe.num_experts, config.stack.num_shared_experts
    width = config.stack.expert_d_ff
    values: dict[str, Any] = {**leaves, **added}
    for weight in ("gate", "up", "down"):
        axis = 0 if weight == "down" else 1
        rows = [
            np.take(np.asarray(leaves[dense_name(layer, f"mlp/{weight}/kernel")]), order_F, axis=axis)
            for layer, order_F in enumerate(order_LF)
        ]
        whole_LXY = np.stack(rows)
        own, common = np.split(whole_LXY, [routed * width], axis=axis + 1)
        parts = np.split(own, routed, axis=axis + 1)
        suffix = "EFD" if weight == "down" else "EDF"
        values[f"{MOE_LAYERS}moe/experts/w_{weight}_{suffix}"] = np.stack(parts, axis=1)
        if shared:
            values[f"{_SHARED}{weight}/kernel"] = common
    for name in (f"{MOE_LAYERS}{rest}" for rest in _block_names(leaves)):
        values[name] = jnp.stack([leaves[twin] for twin in dense_twins(config, name)])
    placed = on_devices(config, values, m.placement)
    return dataclasses.replace(m, config=config, params=params_of_leaves(config, placed), order_LF=order_LF)


def _network_inputs(m: Pretrained, tokens_BT: np.ndarray) -> list[np.ndarray]:
    """Returns the inputs of each layer's dense network, [N, D] float32."""
    require(tokens_BT.ndim == 2 and tokens_BT.size > 0, f"text has shape {tokens_BT.shape}; ids must be [B, T]")
    top = int(tokens_BT.max())
    require(
        int(tokens_BT.min()) >= 0 and top < m.config.vocab_size, f"text holds the id {top}, which the model has not"
    )
    inputs = _capture((m.config, m.placement), m.params, jnp.asarray(tokens_BT, jnp.int32))
    return [np.asarray(x_BTD, np.float32).reshape(-1, x_BTD.shape[-1]) for x_BTD in inputs]


def _capture(static: tuple[ModelConfig, Any], params: Any, tokens_BT: Int[Array, "B T"]) -> list[Float[Array, "B T D"]]:
    config, placement = static

    def run(params: Any, tokens_BT: Array) -> list[Array]:
        is_norm = lambda module, _: module.name == "norm" and len(module.path) == 3  # noqa: E731
        _, seen = MultimodalModel(config, placement).apply(
            {"params": params}, make_batch(tokens_BT), capture_intermediates=is_norm, mutable=["intermediates"]
        )
        blocks = seen["intermediates"]["decoder"]
        return [blocks[f"dense_{layer}"]["norm"]["__call__"][0] for layer in range(config.stack.num_layers)]

    return jax.jit(run)(params, tokens_BT)


def _router_leaves(leaves: Mapping[str, Any], found: Sequence[Groups]) -> dict[str, np.ndarray]:
    """Returns the markers' columns of gate and up; those of up are multiplied by their expert's scale."""
    gates, ups = [], []
    for layer, groups in enumerate(found):
        gate, up, _ = _dense_kernels(layer)
        own_Q = groups.markers_EM.ravel()
        gates.append(np.asarray(leaves[gate], np.float32)[:, own_Q])
        scale_Q = np.repeat(groups.scale_E, groups.markers_EM.shape[1])
        ups.append(np.asarray(leaves[up], np.float32)[:, own_Q] * scale_Q)
    return dict(zip(ROUTER_NAMES, (np.stack(gates), np.stack(ups)), strict=True))


def _parts(leaves: Mapping[str, Any], shared: int) -> dict[str, list[np.ndarray]]:
    """Returns, for each matrix, the pieces [L, D, F] (down: [L, F, D]) to concatenate along the neurons."""
    parts = {}
    for weight in ("gate", "up", "down"):
        suffix = "EFD" if weight == "down" else "EDF"
        experts = np.asarray(leaves[f"{MOE_LAYERS}moe/experts/w_{weight}_{suffix}"])
        own = [experts[:, e] for e in range(experts.shape[1])]
        parts[weight] = own + ([np.asarray(leaves[f"{_SHARED}{weight}/kernel"])] if shared else [])
    return parts


def _dense_kernels(layer: int) -> tuple[str, str, str]:
    gate, up, down = (dense_name(layer, f"mlp/{weight}/kernel") for weight in ("gate", "up", "down"))
    return gate, up, down


def _block_names(leaves: Mapping[str, Any]) -> list[str]:
    """Returns the names of a dense block's parameters outside its network."""
    first = dense_name(0, "")
    own = [name.removeprefix(first) for name in leaves if name.startswith(first)]
    return [name for name in own if not name.startswith("mlp/")]
