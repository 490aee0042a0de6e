"""Converts a model with variable slots to a form that other tools run: `as_plain`, `as_zeda`, `as_longcat`.

The result is a published model of a class that the tool has, written in the hub's layout. `as_zeda` and `as_longcat`
convert exactly or raise an error that lists every reason. `as_plain` computes another function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig, round_half_up
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, named_leaves, params_of_leaves
from anyexperts_jax.models.paths import MOE_LAYERS, ROUTER_KERNEL
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.zeda import CLASS, RETURNS
from anyexperts_jax.routing.policies import IMPORTANCE

_ROUTER = f"{MOE_LAYERS}moe/router/"
_STRENGTH = f"{MOE_LAYERS}moe/strength"
_EXPERTS_PER_TOKEN = "num_experts_per_tok"
_UNREAD = (  # fields of a policy that do not change what a trained model with whole slots computes
    *("balance_weight", "importance_weight", "z_weight", "expert_bias_rate", "balance_scope"),
    *("importance_regulariser", "importance_target", "salience_scope", "slot_gradient", "virtual_bias_init"),
    *("importance_mlp", "slot_rounding", "router_modalities", "router_markers"),
)


def as_plain(m: Pretrained, experts: int | None = None) -> Pretrained:
    """Returns the static top-k model with the same experts. It computes another function, but every tool runs it.

    Importance networks and virtual columns are left out; the router's real columns and all other weights stay the same.

    Args:
      m: a model with variable slots.
      experts: experts per token; None: as many as the model used before it got variable slots.

    Raises:
      UserError: if the model is static already, or a token can reach fewer experts.

    Give a model with random weights variable slots, and convert it to a static one:

    >>> import anyexperts_jax as ax
    >>> from anyexperts_jax.pretrained.convert import as_plain
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "num_attention_heads": 2}
    >>> shape |= {"num_hidden_layers": 2, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 4}
    >>> shape |= {"moe_intermediate_size": 12, "norm_topk_prob": True, "max_position_embeddings": 32, "rope_theta": 1e4}
    >>> slots = ax.attach(random_model(shape), k_min=3, k_max=5, num_virtual=2, preserve=False)
    >>> as_plain(slots, experts=3).config.moe.k_max
    3
    """
    _require_mixture(m, "plain")
    family, values = m.family, dict(m.hub.values)
    if family == "zeda":
        family, values = "qwen3_moe", {key: value for key, value in values.items() if "zce" not in key}
        values["architectures"] = ["Qwen3MoeForCausalLM"]
    if experts is not None:
        home = values if _EXPERTS_PER_TOKEN in values else values.get("text_config", {})
        require(_EXPERTS_PER_TOKEN in home, f"as plain: {m.hub.where} has no {_EXPERTS_PER_TOKEN} to set")
        changed = {**home, _EXPERTS_PER_TOKEN: experts}
        values = changed if home is values else {**values, "text_config": changed}
    hub = HubConfig(values, m.hub.where)
    static: AnyExpertsConfig = FAMILIES[family].config(hub).moe
    same = not routing_differences(m.config.moe, static)
    require(not same, "as plain: the model gives every token this number of experts already; use --form hub")
    config = dataclasses.replace(m.config, moe=static)
    leaves = named_leaves(m.params)
    require(ROUTER_KERNEL in leaves, f"as plain: the router {m.config.moe.router!r} has no form in {family}'s layout")
    leaves[ROUTER_KERNEL] = leaves[ROUTER_KERNEL][..., : static.num_columns]
    bias_LC = m.router_bias_LC
    return dataclasses.replace(
        m,
        config=config,
        params=_only_wanted(config, leaves),
        router_bias_LC=None if bias_LC is None else bias_LC[:, : static.num_columns],
        hub=hub,
        family=family,
    )


def as_zeda(m: Pretrained) -> Pretrained:
    """Returns a model of ZEDA's class (`pretrained.zeda`) that computes the same function.

    Raises:
      UserError: listing every reason why ZEDA's router cannot express the model.

    ZEDA's starting point, a mixture with zero experts beside the real ones, with random weights:

    >>> from anyexperts_jax.pretrained.convert import as_zeda
    >>> from anyexperts_jax.pretrained.random_model import random_model
    >>> shape = {"architectures": ["Qwen3MoePlusPlusForCausalLM"], "hidden_size": 16, "num_attention_heads": 2}
    >>> shape |= {"num_hidden_layers": 2, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 4}
    >>> shape |= {"moe_intermediate_size": 12, "norm_topk_prob": True, "max_position_embeddings": 32, "rope_theta": 1e4}
    >>> shape |= {"use_zce_mask": False, "zce_nums": [4], "zce_types": ["zero"]}
    >>> as_zeda(random_model(shape)).config.moe.num_virtual
    4
    """
    _require_mixture(m, "zeda")
    _require_none("zeda", "ZEDA's router", zeda_obstacles(m))
    moe, leaves = m.config.moe, named_leaves(m.params)
    kind = next(kind for kind, returned in RETURNS.items() if returned == moe.switches.virtual_output)
    own = {
        "architectures": [CLASS],
        "use_zce_mask": False,
        "zce_nums": [moe.num_virtual],
        "zce_types": [kind],
        "norm_topk_prob": moe.switches.normalisation != "none",
        _EXPERTS_PER_TOKEN: moe.slots_bound,
    }
    hub = HubConfig({**m.hub.values, **own}, m.hub.where)
    policy: AnyExpertsConfig = FAMILIES["zeda"].config(hub).moe
    config = dataclasses.replace(m.config, moe=policy)
    leaves[ROUTER_KERNEL] = _whole_kernel(leaves, moe)
    return dataclasses.replace(m, config=config, params=_only_wanted(config, leaves), hub=hub, family="zeda")


def as_longcat(m: Pretrained) -> Pretrained:
    """Converts a LongCat-Flash to its own form, whatever its number of slots. Other families do not have its layers.

    Raises:
      UserError: listing every reason.
    """
    _require_mixture(m, "longcat")
    found = longcat_obstacles(m)
    if m.family != "longcat_flash":
        found.append(
            f"its layers are those of {m.family}, and LongCat-Flash's have two latent attentions and two dense "
            "networks beside a mixture"
        )
    _require_none("longcat", "LongCat-Flash", found)
    moe, leaves = m.config.moe, named_leaves(m.params)
    hub = HubConfig({**m.hub.values, "moe_topk": moe.slots_bound, "zero_expert_num": moe.num_virtual}, m.hub.where)
    config = dataclasses.replace(m.config, moe=FAMILIES["longcat_flash"].config(hub).moe)
    leaves[ROUTER_KERNEL] = _whole_kernel(leaves, moe)
    return dataclasses.replace(m, config=config, params=_only_wanted(config, leaves), hub=hub)


def routing_differences(moe: AnyExpertsConfig, other: AnyExpertsConfig) -> list[str]:
    """Lists the fields in which two policies route differently, without those that only training reads."""
    ours, theirs = _routing_fields(moe), _routing_fields(other)
    return [f"{name}={ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs.get(name, ours[name])]


def _routing_fields(moe: AnyExpertsConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(moe)
    fields |= fields.pop("switches")
    if fields["normalisation"] == "all_raw_gradient":
        fields["normalisation"] = "all"
    unread = set(_UNREAD)
    if moe.num_virtual == 0:
        unread |= {"rho_max", "cap_rounding", "virtual_logits", "virtual_output"}
    if not moe.router.startswith("dtr"):
        unread |= {"router_hidden", "router_rank", "router_gelu"}
    if moe.policy == IMPORTANCE:
        unread.add("policy_dial")
    if moe.switches.hsm_site == "off":
        unread.add("alpha")
    return {name: value for name, value in fields.items() if name not in unread}


def zeda_obstacles(m: Pretrained) -> list[str]:
    """Lists what of the model's function ZEDA's class cannot compute."""
    moe = m.config.moe
    found = _uncapped_obstacles(m)
    if m.family not in ("qwen3_moe", "zeda"):
        found.append(f"its decoder is {m.family}'s, and ZEDA's is Qwen3-MoE's")
    if moe.expert_bias:
        found.append("an expert bias takes part in the choice")
    if moe.scaling_factor != 1:
        found.append(f"its weights are multiplied by {moe.scaling_factor:g}")
    if moe.switches.normalisation not in ("all", "all_raw_gradient", "none"):
        found.append(f"its weights are normalised otherwise (normalisation={moe.switches.normalisation})")
    return found


def longcat_obstacles(m: Pretrained) -> list[str]:
    """Lists what of the model's routing LongCat-Flash's router cannot compute."""
    moe = m.config.moe
    found = _uncapped_obstacles(m)
    if moe.switches.virtual_output != "identity":
        found.append("its virtual experts return zero, and LongCat-Flash's return the block's input")
    if moe.switches.normalisation != "none":
        found.append("its weights are normalised, and LongCat-Flash's are not")
    return found


def _uncapped_obstacles(m: Pretrained) -> list[str]:
    """Lists what a router with a fixed number of slots, and virtual columns treated as real ones, cannot compute."""
    moe, found, leaves = m.config.moe, [], named_leaves(m.params)
    switches = moe.switches
    if moe.num_virtual == 0:
        found.append("it has no virtual experts")
    if moe.policy != IMPORTANCE:
        found.append(f"the policy {moe.policy!r} decides a token's slots")
    elif moe.k_min != moe.k_max or moe.k_max != round_half_up(moe.k_max):
        found.append(f"a token gets {moe.k_min:g} to {moe.k_max:g} slots by its importance, not one number for all")
    if switches.iar != "off":
        found.append(f"importance tilts its scores (iar={switches.iar})")
    if switches.hsm_site != "off" and moe.alpha > 0:
        found.append(f"importance modulates its hidden states (hsm_site={switches.hsm_site})")
    cap = moe.virtual_caps[-1]
    if cap < min(moe.slots_bound, moe.num_virtual):
        found.append(f"at most {cap} of {moe.slots_bound} slots may be virtual (cap_rounding={switches.cap_rounding})")
    if moe.scores != "softmax":
        found.append(f"its scores are a {moe.scores}")
    if moe.num_groups > 1:
        found.append(f"its experts are limited to {moe.groups_kept} of {moe.num_groups} groups")
    if moe.router not in ("linear", "linear_apart"):
        found.append(f"its router is {moe.router!r}, not a linear one")
    bias = leaves.get(f"{_ROUTER}virtual_bias")
    if switches.virtual_logits != "unbiased" and bias is not None and bool(jnp.any(bias != 0)):
        found.append("its virtual columns have biases")
    strength = leaves.get(_STRENGTH)
    if switches.onset == "learned" and strength is not None and bool(jnp.any(jnp.abs(strength) != 1)):
        found.append("the scores of its virtual experts are scaled by each layer's strength (onset=learned)")
    return found


def _require_mixture(m: Pretrained, form: str) -> None:
    split = m.order_LF is not None
    require(not split, f"as {form}: the model is a split dense one, which has no such form; merge it first")
    require(m.config.stack.num_moe_layers > 0, f"as {form}: the model is dense; use --form hub")


def _require_none(form: str, what: str, obstacles: list[str]) -> None:
    if obstacles:
        raise UserError(f"as {form}: {what} cannot express the model: {'; '.join(obstacles)}")


def _whole_kernel(leaves: dict[str, Any], moe: AnyExpertsConfig) -> jax.Array:
    """Returns the router's kernel [L, D, C] with all virtual columns."""
    kernel, apart = leaves[ROUTER_KERNEL], leaves.get(f"{_ROUTER}virtual_kernel")
    real, virtual = (kernel, apart) if apart is not None else np.split(kernel, [moe.num_experts], axis=2)
    if moe.switches.virtual_logits == "tied":
        virtual = jnp.broadcast_to(virtual, (*virtual.shape[:2], moe.num_virtual))
    return jnp.concatenate([real, virtual], axis=2)


def _only_wanted(config: ModelConfig, leaves: dict[str, Any]) -> Any:
    """Selects the parameters of a configuration from those of a model that may have more.

    Raises:
      UserError: if one is missing or has another shape.
    """
    wanted = named_leaves(abstract_params(config))
    wrong = [name for name, leaf in wanted.items() if name not in leaves or leaves[name].shape != leaf.shape]
    require(not wrong, f"the model has no parameters {', '.join(wrong[:3])} of the static model")
    return params_of_leaves(config, {name: leaves[name] for name in wanted})


CONVERSIONS: dict[str, Callable[[Pretrained], Pretrained]] = {
    "plain": as_plain,
    "zeda": as_zeda,
    "longcat": as_longcat,
}
