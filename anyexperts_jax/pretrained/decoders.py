"""The parts that families of text models share: Llama's decoder and the names of its tensors."""

from typing import Any

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import AttentionConfig, StackConfig
from anyexperts_jax.pretrained.hub_config import HubConfig, eos_ids
from anyexperts_jax.pretrained.rules import (
    BATCHED_KERNEL,
    FLAT,
    KERNEL,
    KERNEL_OF_HEADS,
    SAME,
    ExpertLayout,
    Rule,
)

LAYER = "model.layers.{i}."
Gate = tuple[str, str, tuple[int, ...]]  # a router: our parameter, the tensor's name, and its index in our parameter
ONE_GATE: tuple[Gate, ...] = (("kernel", "gate", ()),)


def attention_config(hub: HubConfig, fraction: float = 1.0, **more: Any) -> AttentionConfig:
    """Reads the heads and the rotary positions.

    Args:
      fraction: the default of the model's class for the share of a head's width that is rotated.
      more: further fields of AttentionConfig.
    """
    heads = hub.whole("num_attention_heads")
    head_dim = hub.whole("head_dim", hub.whole("hidden_size") // heads)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=hub.whole("num_key_value_heads", heads),
        head_dim=head_dim,
        **{"rope_fraction": fraction, **hub.rope(head_dim), **more},
    )


def decoder_config(
    hub: HubConfig,
    attention: AttentionConfig,
    *,
    eps: float,
    moe: AnyExpertsConfig | None = None,
    slides: bool = False,
    **stack: Any,
) -> ModelConfig:
    """Reads the configuration of a text decoder.

    Args:
      eps: the default of the model's class for the epsilon of the norms.
      moe: the routing policy; None: the model is dense.
      slides: the default of the model's class for `use_sliding_window`.
      stack: further fields of StackConfig.

    Raises:
      UserError: for an activation or an attention window that is not supported.
    """
    hub.only("hidden_act", "silu")
    layers = hub.whole("num_hidden_layers")
    length = hub.whole("max_position_embeddings")
    kinds = hub.get("layer_types", [])
    windowed = isinstance(kinds, list) and "sliding_attention" in kinds
    window = hub.whole("sliding_window", length) if windowed or hub.get("use_sliding_window", slides) else length
    require(
        window >= length,
        f"{hub.where}: sliding_window={window} is below max_position_embeddings={length}: "
        "attention in a window is not supported",
    )
    vocab_size = hub.whole("vocab_size")
    ends = [id for id in eos_ids(hub.values) if isinstance(id, int) and 0 <= id < vocab_size]
    eos = ends[0] if ends else 0
    pad = hub.get("pad_token_id")
    fields = {"num_dense_layers": layers, "moe_every": 1, "num_shared_experts": 0} if moe is None else {}
    return ModelConfig(
        vocab_size=vocab_size,
        max_length=length,
        pad_id=pad if isinstance(pad, int) and 0 <= pad < vocab_size else eos,
        eos_id=eos,
        tie_embeddings=hub.flag("tie_word_embeddings", False),
        modality_embedding=False,
        stack=StackConfig(
            d_model=hub.whole("hidden_size"),
            num_layers=layers,
            norm_eps=hub.number("rms_norm_eps", eps),
            attention=attention,
            **{"num_shared_experts": 0, **fields, **stack},
        ),
        moe=AnyExpertsConfig.static_top_k(1, 1) if moe is None else moe,
        vision=None,
        audio=None,
    )


def around_rules(config: ModelConfig, table: str = "model.embed_tokens.weight") -> tuple[Rule, ...]:
    """Rules for the token embeddings, the last norm, and the head if it is not tied."""
    head = () if config.tie_embeddings else (Rule("head/kernel", "lm_head.weight", KERNEL),)
    return (Rule("tokens/table", table), Rule("final_norm/scale", "model.norm.weight"), *head)


def norm_rules() -> tuple[Rule, ...]:
    """Rules for the two norms of a layer."""
    return (
        Rule("{layer}/self_attention/norm/scale", f"{LAYER}input_layernorm.weight"),
        Rule("{layer}/norm/scale", f"{LAYER}post_attention_layernorm.weight"),
    )


def attention_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Rules for the four projections of attention, with biases and norms if the configuration has them."""
    attention, ours, theirs = config.stack.attention, "{layer}/self_attention/attention/", f"{LAYER}self_attn."
    rules = [Rule(f"{ours}out/kernel", f"{theirs}o_proj.weight", KERNEL_OF_HEADS)]
    for name in ("query", "key", "value"):
        rules.append(Rule(f"{ours}{name}/kernel", f"{theirs}{name[0]}_proj.weight", KERNEL))
        if attention.qkv_bias:
            rules.append(Rule(f"{ours}{name}/bias", f"{theirs}{name[0]}_proj.bias", FLAT))
    if attention.out_bias:
        rules.append(Rule(f"{ours}out/bias", f"{theirs}o_proj.bias"))
    if attention.qk_norm:
        rules += [Rule(f"{ours}{name}_norm/scale", f"{theirs}{name[0]}_norm.weight") for name in ("query", "key")]
    return tuple(rules)


def dense_mlp_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Rules for the dense FFNs."""
    rules = []
    for name in ("gate", "up", "down"):
        ours, theirs = f"{{layer}}/mlp/{name}/", f"{LAYER}mlp.{name}_proj."
        rules.append(Rule(f"{ours}kernel", f"{theirs}weight", KERNEL, "dense"))
        if config.stack.mlp_bias:
            rules.append(Rule(f"{ours}bias", f"{theirs}bias", layers="dense"))
    return tuple(rules)


def expert_rules(
    layout: ExpertLayout,
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    gates: tuple[Gate, ...] = ONE_GATE,
) -> tuple[Rule, ...]:
    """Rules for the router and the experts of an MoE layer.

    Args:
      layout: "stacked" is transformers 5's layout, with gate before up along the rows; "stacked_kernels" has the
        transposed matrices, with gate before up along the columns.
      block: the name of the layer's FFN.
      names: the names of an expert's gate, up and down tensors.
      gates: the layer's routers.
    """
    ours, theirs = "{layer}/moe/experts/", f"{LAYER}{block}.experts."
    routers = [
        Rule(f"{{layer}}/moe/router/{parameter}", f"{LAYER}{block}.{gate}.weight", KERNEL, "moe", place=place)
        for parameter, gate, place in gates
    ]
    if layout != "each":
        held, axis = (BATCHED_KERNEL, 1) if layout == "stacked" else (SAME, 2)
        return (
            *routers,
            Rule(f"{ours}w_gate_EDF", f"{theirs}gate_up_proj", held, "moe", part=(axis, 0)),
            Rule(f"{ours}w_up_EDF", f"{theirs}gate_up_proj", held, "moe", part=(axis, 1)),
            Rule(f"{ours}w_down_EFD", f"{theirs}down_proj", held, "moe"),
        )
    leaves = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
    own = [
        Rule(ours + leaf, f"{theirs}{{e}}.{name}.weight", KERNEL, "moe")
        for leaf, name in zip(leaves, names, strict=True)
    ]
    return (*routers, *own)
