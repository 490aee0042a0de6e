"""Writes the model card (README.md) of a conversion, which says what the folder holds and what was left out."""

from collections.abc import Callable

from anyexperts_jax.pretrained.difference import Difference
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.zeda import CLASS

CARD = "README.md"
_HEADS = {  # metadata for the hub; of the two forms, transformers itself loads only the plain one
    "plain": "---\nlibrary_name: transformers\ntags:\n- mixture-of-experts\n---\n",
    "zeda": "---\ntags:\n- mixture-of-experts\n---\n",
    "longcat": "---\ntags:\n- mixture-of-experts\n---\n",
}


def card(form: str, m: Pretrained, converted: Pretrained, measured: Difference, sample: str) -> str:
    """Returns the text of the card.

    Args:
      form: the name of the conversion.
      m: the model with variable slots.
      converted: the model in the folder.
      measured: the difference of the two models on a sample.
      sample: a description of the sample.
    """
    return _HEADS[form] + _CARDS[form](m, converted) + _measurement(measured, sample)


def _plain(m: Pretrained, converted: Pretrained) -> str:
    experts = int(converted.config.moe.k_max)
    return f"""
# A static mixture, {experts} experts per token

A static top-k mixture, written by anyexperts_jax from a model in which tokens get different numbers of experts:
{_slots(m)}.

**This does not compute the same function.** The part that chose a token's number of experts is left out, and every
token gets {experts}. The experts, the real columns of the router and all other weights are that model's. Its importance
networks, virtual columns and strengths are not in this folder; `anyexperts export --form anyexperts` keeps them.

It needs no code of its own: its class is `{converted.hub.values["architectures"][0]}`.
"""


def _zeda(m: Pretrained, converted: Pretrained) -> str:
    del m  # the converted model computes the same function
    moe = converted.config.moe
    returned = "nothing" if moe.switches.virtual_output == "zero" else "the block's input"
    return f"""
# A mixture with zero experts, in ZEDA's form

A mixture with {moe.num_experts} experts and {moe.num_virtual} zero experts a layer, which compute nothing and return
{returned}. Each token's {moe.slots_bound} are chosen among both, so tokens differ in how many real experts they get.

**This is the same function** as the model that anyexperts_jax wrote it from, up to rounding. It is not a plain
Qwen3-MoE: the class `{CLASS}` comes with ZEDA's own fork of transformers and of SGLang (arXiv 2605.18643), and
transformers itself does not have it. anyexperts_jax reads it.
"""


def _longcat(m: Pretrained, converted: Pretrained) -> str:
    del m  # the same function
    moe = converted.config.moe
    return f"""
# A LongCat-Flash

A model with {moe.num_experts} experts and {moe.num_virtual} zero experts a layer, which return their input. Each
token's {moe.slots_bound} are chosen among both, so tokens differ in how many real experts they get.

**This is the same function** as the model that anyexperts_jax wrote it from, up to rounding. Its class is
`{converted.hub.values["architectures"][0]}`. The matrices that some files hold for zero experts, which nothing uses,
are not in this folder.
"""


_CARDS: dict[str, Callable[[Pretrained, Pretrained], str]] = {"plain": _plain, "zeda": _zeda, "longcat": _longcat}


def _slots(m: Pretrained) -> str:
    moe = m.config.moe
    virtual = f", of which up to {moe.virtual_caps[-1]} are virtual" if moe.num_virtual else ""
    if moe.policy != "importance":
        return f"the policy {moe.policy!r} at {moe.policy_dial:g} decides, up to {moe.slots_bound} experts"
    return f"{moe.k_min:g} to {moe.k_max:g} slots{virtual}"


def _measurement(found: Difference, sample: str) -> str:
    return f"""
## Measured

On {found.tokens} tokens, {sample}:

| | the model it was written from | this folder |
|---|---|---|
| real experts a token and layer | {found.experts[0]:.3f} | {found.experts[1]:.3f} |
| perplexity | {found.perplexity[0]:.4f} | {found.perplexity[1]:.4f} |

The largest difference of two logits is {found.largest_logit:.3g}; the mean KL divergence of the predictions is
{found.mean_kl:.3g} nats a token.
"""
