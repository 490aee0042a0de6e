"""The names of a model's parameters, and the kind of parameter that each name stands for.

A name is the path of `models.init.named_leaves`: "decoder/moe_layers/moe/router/kernel". Parameters of the repeated
blocks are stacked over layers under "decoder/moe_layers"; leading dense blocks are "decoder/dense_0" and so on. The
modules of `nn` and `models` choose these names; code outside them asks here.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import logical_axes
from anyexperts_jax.nn.config import StackConfig

Kind = Literal["expert", "router", "importance"]
Tower = Literal["text", "decoder", "vision", "audio"]

MOE_LAYERS = "decoder/moe_layers/"
ROUTER_KERNEL = f"{MOE_LAYERS}moe/router/kernel"  # [L, D, C], of a linear router
EXPERTS_DOWN = f"{MOE_LAYERS}moe/experts/w_down_EFD"  # [L, E, F, D], of all layers of experts
_KINDS: dict[Kind, re.Pattern[str]] = {
    "expert": re.compile(r"(.*/)?moe/experts/.*"),
    "router": re.compile(r"(.*/)?moe/router/.*"),
    "importance": re.compile(r"(.*/)?importance/.*"),  # in the MoE layer, or in the block if it modulates the stream
}
_EXPERT_WEIGHT = re.compile(rf"{MOE_LAYERS}moe/experts/w_(gate|up|down)_E[DF][DF]")
_DENSE_BEFORE = re.compile(rf"{MOE_LAYERS}before_(\d+)/(.*)")
_MOE_BLOCK = re.compile(rf"{MOE_LAYERS}((self_attention|norm)/.*)")


def is_a(kind: Kind, name: str) -> bool:
    """Whether a parameter is of this kind: an expert's weight [L, E, ...], a router's or an importance network's."""
    return _KINDS[kind].fullmatch(name) is not None


def is_routing(name: str) -> bool:
    """Whether a parameter belongs to the routing policy: a router's or an importance network's."""
    return is_a("router", name) or is_a("importance", name)


def leaves_of(model: ModelConfig, kind: Kind) -> Any:
    """A tree of bools with the parameters' structure: True for the parameters of this kind."""
    return _named_map(lambda name: is_a(kind, name), logical_axes(model))


def any_of(kind: Kind, flags: Any) -> bool:
    """Whether a tree of bools over the parameters is True for any of this kind; None stands for True everywhere."""
    if flags is None:
        return True
    leaves = jax.tree_util.tree_leaves_with_path(flags)
    return any(flag and is_a(kind, jax.tree_util.keystr(path, simple=True, separator="/")) for path, flag in leaves)


def is_matmul(name: str) -> bool:
    """Whether a parameter is a dense matrix that all positions go through: not an expert's, not an embedding table."""
    return name.endswith("/kernel")


def tower_of(name: str) -> Tower:
    """The part of the model that a parameter is in: an encoder, the stack of blocks, or everything else ("text")."""
    top = name.partition("/")[0]
    towers: dict[str, Tower] = {
        "vision": "vision",
        "vision_tower": "vision",
        "audio": "audio",
        "audio_tower": "audio",
        "decoder": "decoder",
    }
    return towers.get(top, "text")


def short_name(name: str) -> str:
    """The name as users are shown it: "moe/router/kernel"."""
    return name.removeprefix(MOE_LAYERS)


def expert_weight(name: str) -> str | None:
    """ "gate", "up" or "down" if the parameter is that matrix of the experts, else None."""
    found = _EXPERT_WEIGHT.fullmatch(name)
    return found and found[1]


def dense_name(layer: int, rest: str) -> str:
    """The name of a parameter of dense block number `layer`: "decoder/dense_3/mlp/up/kernel"."""
    return f"decoder/dense_{layer}/{rest}"


class LayerPlace(NamedTuple):
    """Where the parameters of one layer are."""

    prefix: str  # what their names begin with, without the last slash
    place: tuple[int, ...]  # index into the stacked arrays; empty: the layer's arrays are not stacked


def layer_place(stack: StackConfig, layer: int) -> LayerPlace:
    """Where the parameters of layer number `layer`, dense or MoE, are."""
    if layer < stack.num_dense_layers:
        return LayerPlace(dense_name(layer, "").rstrip("/"), ())
    group, place = divmod(layer - stack.num_dense_layers, stack.moe_every)
    inside = "" if is_moe_layer(stack, layer) else f"/before_{place}"
    return LayerPlace(MOE_LAYERS.rstrip("/") + inside, (group,))


def is_moe_layer(stack: StackConfig, layer: int) -> bool:
    """Whether layer number `layer` is a mixture of experts."""
    after = layer - stack.num_dense_layers
    return after >= 0 and after % stack.moe_every == stack.moe_every - 1


def dense_twins(model: ModelConfig, name: str) -> list[str]:
    """The names of the parameters that correspond to this one in the same model without experts, one for each layer
    stacked in it. An expert's matrix corresponds to the dense block's. Empty if the dense model has no such parameter.
    """
    stack = model.stack
    first_of_group = [stack.num_dense_layers + group * stack.moe_every for group in range(stack.num_moe_layers)]
    last = stack.moe_every - 1
    if weight := expert_weight(name):
        return [dense_name(layer + last, f"mlp/{weight}/kernel") for layer in first_of_group]
    if before := _DENSE_BEFORE.fullmatch(name):
        return [dense_name(layer + int(before[1]), before[2]) for layer in first_of_group]
    if block := _MOE_BLOCK.fullmatch(name):
        return [dense_name(layer + last, block[1]) for layer in first_of_group]
    return [] if name.startswith(MOE_LAYERS) else [name]


def moe_probe(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arrays that the MoE layers put into the collection "probe", stacked over layers: "logits_BTC" and so on."""
    return variables["probe"]["decoder"]["moe_layers"]["moe"]


def _named_map(function: Callable[[str], Any], tree: Any) -> Any:
    """The tree with each leaf replaced by `function` of its name; tuples are leaves."""
    name = lambda path, _: function(jax.tree_util.keystr(path, simple=True, separator="/"))  # noqa: E731
    return jax.tree_util.tree_map_with_path(name, tree, is_leaf=lambda node: isinstance(node, tuple))
