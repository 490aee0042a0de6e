"""ZEDA's Qwen3-MoE (arXiv 2605.18643), whose router also chooses among zero experts, which compute nothing.

Zero experts have router columns but no weights. Softmax, top-k and the normalisation of the weights are over all
columns, and nothing limits how many of a token's k are zero experts: they are virtual experts without a cap and without
biases. `zce_types` says what they return: "zero" (in ZEDA's releases) nothing, "copy" the block's input, which is also
what this package's virtual experts return by default.
"""

from typing import Any

from anyexperts_jax.core.errors import comma_list, require, shown
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.qwen3 import moe_config, qwen3_rules

CLASS = "Qwen3MoePlusPlusForCausalLM"
RETURNS = {"zero": "zero", "copy": "identity"}  # zce_types -> switches.virtual_output


def uncapped(num_experts: int, num_virtual: int) -> dict[str, Any]:
    """Returns the fields of AnyExpertsConfig for virtual experts that are treated as any other router column.

    rho_max, from which nominal budgets are computed, is their share if all columns are chosen equally often.
    """
    return {
        "num_virtual": num_virtual,
        "rho_max": num_virtual / (num_experts + num_virtual),
        "cap_rounding": "off",
        "virtual_logits": "unbiased",
    }


def _config(hub: HubConfig) -> ModelConfig:
    for key in ("zce_nums", "zce_types", "use_zce_mask"):
        require(hub.get(key) is not None, f"{hub.where} has no {key}; ZEDA's releases say it")
    hub.only("use_zce_mask", False)  # true removes the zero experts from the router
    counts, kinds = hub.get("zce_nums"), hub.get("zce_types")
    one = isinstance(counts, list) and isinstance(kinds, list) and len(counts) == len(kinds) == 1
    require(one, f"{hub.where}: zce_nums={shown(counts)}, zce_types={shown(kinds)}: only one kind is supported")
    count, kind = counts[0], kinds[0]
    whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
    require(whole, f"{hub.where}: zce_nums={shown(counts)} must hold a whole number >= 1")
    known = isinstance(kind, str) and kind in RETURNS
    require(known, f"{hub.where}: zce_types={shown(kinds)} is not supported, only {comma_list(RETURNS)}")
    return moe_config(hub, virtual_output=RETURNS[kind], **uncapped(hub.num_experts(), count))


ZEDA = Family((CLASS,), _config, qwen3_rules)
