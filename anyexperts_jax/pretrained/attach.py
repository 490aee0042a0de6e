"""`attach` gives a model that was read variable slots; `detach` takes them away again."""

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
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, init_leaves, logical_axes, named_leaves, params_of_leaves
from anyexperts_jax.models.paths import MOE_LAYERS
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.sharding.placement import Placement, is_split
from anyexperts_jax.sharding.specs import param_shardings

ROUTER = "linear_apart"  # whose virtual columns are a parameter of their own: the base's stay as they are
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
    """The model with an importance network in every layer of experts, `num_virtual` virtual experts and a window.

    The parameters of the base stay the arrays that they are. With `preserve` the first forward pass is the base's, bit
    for bit in float32 on one device: the importance network gives every token the logit at which the window rounds to
    the base's number of experts, and the strength of every layer is 0, so that modulation and tilt have no effect and
    no virtual expert can win a slot. `routing.onset` says how training leaves that point: the strength moves at the
    first step, and lets the rest in. Without `preserve` the model starts as the paper's: importance 1/2, the full
    tilt and modulation, virtual experts that compete from the first step on.

    Args:
      m: a mixture with a fixed number of experts a token.
      k_min, k_max: slots of a token of importance 0 and 1. With `preserve` the base's number lies between them.
      num_virtual: virtual experts, of which a token may use a fifth of its slots; 0: none.
      preserve: whether the first forward pass is the base's.
      seed: of the new parameters.

    Raises:
      UserError: a dense model, one that has variable slots already, or a window that does not fit it.

    A model of random weights, given 3 to 5 slots a token:

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
    bias = importance_bias(config.moe, int(m.config.moe.k_max)) if preserve else 0.0
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
    """The configuration of a model to which `attach` has given slots.

    Raises:
      UserError: as `attach`.
    """
    base = config.moe
    require(config.stack.num_moe_layers > 0, "attach: the model is dense; split it into experts first")
    own = base.num_virtual > 0 and base.router != ROUTER
    require(not own, "attach: the model has virtual experts of its own; only a fixed number of experts is supported")
    static = not base.uses_importance and base.num_virtual == 0 and base.router != ROUTER
    require(static, "attach: the model has variable slots already; detach them first")
    require(base.router == "linear", f"attach: the model's router is {base.router!r}; only a linear one is supported")
    moe = dataclasses.replace(
        base,
        router=ROUTER,
        num_virtual=num_virtual,
        k_min=k_min,
        k_max=k_max,
        rho_max=AnyExpertsConfig.rho_max if num_virtual else 0.0,
        importance_weight=AnyExpertsConfig.importance_weight,
        switches=dataclasses.replace(
            base.switches, hsm_site="block_input", iar="add", onset="learned" if preserve else "full"
        ),
    )
    if preserve:
        importance_bias(moe, int(base.k_max))  # a window that never gives the base's number is refused
    return dataclasses.replace(config, moe=moe)


def detach(m: Pretrained) -> Pretrained:
    """The base of a model with attached slots. Its parameters are the arrays that are in the model, so they are those
    that were read, bit for bit, where training left them alone.

    Raises:
      UserError: when nothing is attached.

    A model of random weights, with slots attached and detached again:

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
        router_bias_LC=None if bias_LC is None else bias_LC[:, : config.moe.num_experts],
    )


def is_attached(m: Pretrained) -> bool:
    """Whether `attach` made the model."""
    return m.config.moe.router == ROUTER


def base_config(m: Pretrained) -> ModelConfig:
    """The configuration before `attach`: the policy that the family reads in config.json."""
    return dataclasses.replace(m.config, moe=FAMILIES[m.family].config(m.hub).moe)


def importance_bias(moe: AnyExpertsConfig, experts: int) -> float:
    """The importance logit at which a token gets this many slots, as far from the next number as can be.

    Raises:
      UserError: when no importance gives it, or the experts do not suffice for a window without virtual ones.
    """
    window = f"k_min={moe.k_min:g}, k_max={moe.k_max:g}"
    require(
        moe.slots_bound <= moe.experts_in_reach,
        f"attach: {window} can need {moe.slots_bound} of {moe.experts_in_reach} experts in reach before the virtual "
        "ones take part; lower k_max, or start as the paper does (preserve=False)",
    )
    low, high = max(moe.k_min, experts - 0.5), min(moe.k_max, experts + 0.5)
    require(
        low < high or moe.k_min == moe.k_max == experts,
        f"attach: a window of {window} never gives the {experts} experts that a token of the base has; widen it, or "
        "start as the paper does (preserve=False)",
    )
    if moe.k_min == moe.k_max:
        return 0.0
    share = ((low + high) / 2 - moe.k_min) / (moe.k_max - moe.k_min)
    return math.log(share / (1 - share))


def new_leaves(config: ModelConfig, have: dict[str, Any], placement: Placement, seed: int) -> dict[str, Any]:
    """Initial values of the parameters that are not in `have`, where they belong on its devices."""
    names = tuple(name for name in named_leaves(abstract_params(config)) if name not in have)
    return on_devices(config, init_leaves(config, jax.random.key(seed), names), placement)


def on_devices(config: ModelConfig, values: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """Parameters of the model by name, put where they belong; other names are left out."""
    shapes = abstract_params(config)
    known = {name: values[name] for name in named_leaves(shapes) if name in values}
    if not is_split(placement):
        return {name: jax.device_put(value, placement.device) for name, value in known.items()}
    shardings = named_leaves(param_shardings(placement.mesh, logical_axes(config), shapes))
    return {name: jax.device_put(value, shardings[name]) for name, value in known.items()}


def _with_virtual(bias_LC: Float[Array, "L E"] | None, num_virtual: int) -> Float[Array, "L C"] | None:
    """The virtual columns get the lowest bias of their layer: sigmoid scores of 0 then never rank before a real one."""
    if bias_LC is None:
        return None
    lowest_L1 = bias_LC.min(axis=1, keepdims=True)
    virtual_LV = jnp.broadcast_to(lowest_L1, (bias_LC.shape[0], num_virtual))
    return jax.device_put(jnp.concatenate([bias_LC, virtual_LV], axis=1), bias_LC.sharding)
