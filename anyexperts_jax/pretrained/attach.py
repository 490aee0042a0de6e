"""`attach` gives a published mixture-of-experts model variable slots; `detach` removes them again."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.core.switches import Onset, VirtualOutput
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, init_leaves, logical_axes, named_leaves, params_of_leaves
from anyexperts_jax.models.paths import MOE_LAYERS
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.split_policy import ROUTER as SPLIT_ROUTER
from anyexperts_jax.pretrained.split_policy import split_policy
from anyexperts_jax.sharding.placement import Placement, is_split
from anyexperts_jax.sharding.specs import param_shardings

ROUTER = "linear_apart"  # keeps its virtual columns in a separate parameter, so the base's columns stay unchanged
_IMPORTANCE_BIAS = f"{MOE_LAYERS}moe/importance/out/bias"


def attach(
    m: Pretrained,
    *,
    k_min: float,
    k_max: float,
    num_virtual: int = 0,
    preserve: bool = True,
    seed: int = 0,
) -> Pretrained:
    """Adds an importance network to every MoE layer, `num_virtual` virtual experts and a window of slots.

    A split model gets slots that begin with all of its experts on. Its virtual experts return zero, since each expert
    has weight 1, and they take part from the beginning: every token has one slot for each expert, real or virtual.

    The base's parameters are kept as the same arrays. With `preserve` the first forward pass equals the base's, bit for
    bit in float32 on one device: the importance network gives every token the logit at which the window rounds to the
    base's number of experts, and the strength of every layer is 0, so that modulation and tilt have no effect and no
    virtual expert can win a slot. `routing.onset` explains how training leaves this point: the strength changes at the
    first step, and the other parts take effect with it. Without `preserve` the model starts as in the paper: importance
    1/2, full tilt and modulation, and virtual experts that compete from the first step.

    Args:
      m: a mixture-of-experts model with a fixed number of slots per token, or a split model.
      k_min, k_max: slots of a token of importance 0 and 1. With `preserve` the base's number must lie between them; a
        split model's is that of all its experts, real and virtual.
      num_virtual: number of virtual experts, which may take up to a fifth of a token's slots; 0: none, or those that
        the model has already (ZEDA, LongCat-Flash). These take part as before; `k_min` and `k_max` count their slots.
      preserve: whether the first forward pass equals the base's.
      seed: seed of the new parameters.

    Raises:
      UserError: if the model is dense or has variable slots already, if it has virtual experts and `num_virtual` asks
        for more, or if the window does not fit it.

    Give a model with random weights 3 to 5 slots per token:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "num_attention_heads": 2}
    >>> shape |= {"num_hidden_layers": 2, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 4}
    >>> shape |= {"moe_intermediate_size": 12, "norm_topk_prob": True, "max_position_embeddings": 32, "rope_theta": 1e4}
    >>> base = random_model(shape)
    >>> slots = ax.attach(base, k_min=3, k_max=5, num_virtual=2)
    >>> bool((slots.logits([[1, 2, 3]]) == base.logits([[1, 2, 3]])).all())
    True
    """
    config = attached_config(m.config, k_min=k_min, k_max=k_max, num_virtual=num_virtual, preserve=preserve)
    bias = importance_bias(config.moe, _slots_of_base(m.config.moe, config.moe)) if preserve else 0.0
    leaves = named_leaves(m.params)
    new = new_leaves(config, leaves, m.placement, seed)
    if preserve:
        new[_IMPORTANCE_BIAS] = jax.device_put(
            jnp.full_like(new[_IMPORTANCE_BIAS], bias), new[_IMPORTANCE_BIAS].sharding
        )
    return dataclasses.replace(
        m,
        config=config,
        params=params_of_leaves(config, {**leaves, **new}),
        router_bias_LC=_with_virtual(m.router_bias_LC, num_virtual),
    )


def attached_config(
    config: ModelConfig, *, k_min: float, k_max: float, num_virtual: int = 0, preserve: bool = True
) -> ModelConfig:
    """Returns the configuration that `attach` gives a model.

    Raises:
      UserError: as for `attach`.
    """
    base = config.moe
    require(config.stack.num_moe_layers > 0, "attach: the model is dense; split it into experts first")
    static = not base.uses_importance and base.router != ROUTER
    require(static, "attach: the model has variable slots already; detach them first")
    require(
        base.router in ("linear", SPLIT_ROUTER),
        f"attach: the model's router is {base.router!r}; only those of published mixtures and of split are supported",
    )
    own, was_split = base.num_virtual > 0, base.router == SPLIT_ROUTER
    require(
        not (own and num_virtual),
        f"attach: the model has {base.num_virtual} virtual experts of its own; leave out num_virtual={num_virtual}",
    )
    onset: Onset = "full" if not preserve else "learned_importance" if own or was_split else "learned"
    columns: dict[str, Any] = {
        "router": SPLIT_ROUTER if was_split else ROUTER,
        "num_virtual": num_virtual,
        "rho_max": AnyExpertsConfig.rho_max if num_virtual else 0.0,
    }
    # An expert of a split model has weight 1: the identity would add the block's input, once for each virtual slot.
    output: VirtualOutput = "zero" if was_split else base.switches.virtual_output
    moe = dataclasses.replace(
        base,
        **({} if own else columns),
        k_min=k_min,
        k_max=k_max,
        importance_weight=AnyExpertsConfig.importance_weight,
        switches=dataclasses.replace(
            base.switches, hsm_site="block_input", iar="add", onset=onset, virtual_output=output
        ),
    )
    if preserve:
        # This refuses a window that cannot give the base's number of experts.
        importance_bias(moe, _slots_of_base(base, moe))
    return dataclasses.replace(config, moe=moe)


def detach(m: Pretrained) -> Pretrained:
    """Returns the base of a model with attached slots.

    Its parameters are the model's own arrays, so those that training did not change equal the published ones bit for
    bit.

    Raises:
      UserError: if no slots are attached.

    Attach slots to a model with random weights, and detach them again:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "num_attention_heads": 2}
    >>> shape |= {"num_hidden_layers": 2, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 4}
    >>> shape |= {"moe_intermediate_size": 12, "norm_topk_prob": True, "max_position_embeddings": 32, "rope_theta": 1e4}
    >>> slots = ax.attach(random_model(shape), k_min=3, k_max=5)
    >>> ax.detach(slots).config.moe.k_max
    4
    """
    require(is_attached(m), "detach: the model has no attached slots")
    config = base_config(m)
    bias_LC = m.router_bias_LC
    return dataclasses.replace(
        m,
        config=config,
        params=params_of_leaves(config, named_leaves(m.params)),
        router_bias_LC=None if bias_LC is None else bias_LC[:, : config.moe.num_columns],
    )


def is_attached(m: Pretrained) -> bool:
    """Whether the model has attached slots."""
    return m.config.moe.router == ROUTER or m.config.moe.uses_importance


def base_config(m: Pretrained) -> ModelConfig:
    """Returns the configuration before `attach`, with the routing policy that config.json describes."""
    moe = m.config.moe
    was_split = m.order_LF is not None
    base = split_policy(moe.num_experts, moe.router_markers) if was_split else FAMILIES[m.family].config(m.hub).moe
    return dataclasses.replace(m.config, moe=base)


def importance_bias(moe: AnyExpertsConfig, experts: int) -> float:
    """Returns the importance logit at which a token gets this many slots, halfway between the rounding thresholds.

    Raises:
      UserError: if no importance gives this number, or there are fewer real experts than the window can ask for.
    """
    window = f"k_min={moe.k_min:g}, k_max={moe.k_max:g}"
    require(
        moe.slots_bound <= moe.experts_in_reach or moe.router == SPLIT_ROUTER,
        f"attach: {window} can need {moe.slots_bound} of {moe.experts_in_reach} experts in reach before the virtual "
        "ones take part; lower k_max, or start as the paper does (preserve=False)",
    )
    low, high = max(moe.k_min, experts - 0.5), min(moe.k_max, experts + 0.5)
    require(
        low < high or moe.k_min == moe.k_max == experts,
        f"attach: a window of {window} never gives the {experts} experts that a token of the base has"
        f"{', virtual ones included' if experts > moe.num_experts else ''}; widen it, or start as the paper does "
        "(preserve=False)",
    )
    if moe.k_min == moe.k_max:
        return 0.0
    share = ((low + high) / 2 - moe.k_min) / (moe.k_max - moe.k_min)
    return math.log(share / (1 - share))


def _slots_of_base(base: AnyExpertsConfig, moe: AnyExpertsConfig) -> int:
    """Returns the number of slots with which a token computes what the base does."""
    return moe.num_columns if base.router == SPLIT_ROUTER else int(base.k_max)


def new_leaves(config: ModelConfig, have: dict[str, Any], placement: Placement, seed: int) -> dict[str, Any]:
    """Initialises the parameters that `have` lacks, and places them on the model's devices."""
    names = tuple(name for name in named_leaves(abstract_params(config)) if name not in have)
    return on_devices(config, init_leaves(config, jax.random.key(seed), names), placement)


def on_devices(config: ModelConfig, values: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """Places the parameters of a model on its devices; names that the model does not have are left out."""
    shapes = abstract_params(config)
    known = {name: values[name] for name in named_leaves(shapes) if name in values}
    if not is_split(placement):
        return {name: jax.device_put(value, placement.device) for name, value in known.items()}
    shardings = named_leaves(param_shardings(placement.mesh, logical_axes(config), shapes))
    return {name: jax.device_put(value, shardings[name]) for name, value in known.items()}


def _with_virtual(bias_LC: Float[Array, "L E"] | None, num_virtual: int) -> Float[Array, "L C"] | None:
    """Adds virtual columns to the expert biases.

    They get the lowest bias of their layer, so that a virtual expert with a sigmoid score of 0 never ranks before a
    real one.
    """
    if bias_LC is None or not num_virtual:
        return bias_LC
    lowest_L1 = bias_LC.min(axis=1, keepdims=True)
    virtual_LV = jnp.broadcast_to(lowest_L1, (bias_LC.shape[0], num_virtual))
    return jax.device_put(jnp.concatenate([bias_LC, virtual_LV], axis=1), bias_LC.sharding)
