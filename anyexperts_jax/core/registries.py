"""Every extension point: one registry for each thing that a user's own package may add.

The built-in entries are named by where they are defined and load when they are used, so that this module, which the
configuration needs to check names, imports none of them.
"""

from typing import Any

from anyexperts_jax.core.registry import Registry

# routing.routers.base.Router: where the router's logits come from
ROUTERS: Registry[Any] = Registry(
    "router",
    {
        "linear": "anyexperts_jax.routing.routers.linear:LINEAR",
        "per_modality": "anyexperts_jax.routing.routers.linear:PER_MODALITY",
        "per_modality_shared": "anyexperts_jax.routing.routers.linear:PER_MODALITY_SHARED",
        "dtr": "anyexperts_jax.routing.routers.dtr:DTR",
        "dtr_shared": "anyexperts_jax.routing.routers.dtr:DTR_SHARED",
    },
)

# routing.regularisers.Regulariser: what holds the importance, and with it the budget, in place
REGULARISERS: Registry[Any] = Registry(
    "importance regulariser",
    {
        "logit_l2": "anyexperts_jax.routing.regularisers:logit_l2",
        "mean_target": "anyexperts_jax.routing.regularisers:mean_target",
        "salience": "anyexperts_jax.routing.regularisers:salience",
    },
)

# ops.experts.ExpertOps: what computes the experts, on rows in buffers and on tokens
IMPLEMENTATIONS: Registry[Any] = Registry(
    "implementation",
    {
        "reference": "anyexperts_jax.ops.expert_ops.plain:REFERENCE",
        "xla": "anyexperts_jax.ops.expert_ops.plain:XLA",
        "pallas_tpu": "anyexperts_jax.ops.expert_ops.tpu:PALLAS_TPU",
        "pallas_gpu": "anyexperts_jax.ops.expert_ops.gpu:PALLAS_GPU",
        "pallas_triton": "anyexperts_jax.ops.expert_ops.gpu:PALLAS_TRITON",
    },
)

# dispatch.base.Dispatcher: what moves rows between tokens and experts, on one device and on a mesh
DISPATCHERS: Registry[Any] = Registry(
    "dispatch",
    {
        "blocks": "anyexperts_jax.dispatch.blocks:dispatch_blocks",
        "capacity": "anyexperts_jax.dispatch.capacity:dispatch_capacity",
        "dense": "anyexperts_jax.dispatch.dense:dispatch_dense",
        "exchange": "anyexperts_jax.dispatch.exchange:dispatch_exchange",
    },
)

# tokenizers.base.TokenizerKind: what reads the tokenizer at a path
TOKENIZERS: Registry[Any] = Registry(
    "tokenizer kind",
    {
        "bytes": "anyexperts_jax.tokenizers.bytes:BytesTokenizer",
        "huggingface": "anyexperts_jax.tokenizers.huggingface:HuggingFaceTokenizer",
    },
)

# data.domain.Domain, as a class or a function that makes one: a family of questions, generated
DOMAINS: Registry[Any] = Registry(
    "domain",
    {
        "general": "anyexperts_jax.data.five_domains.general:General",
        "ocr": "anyexperts_jax.data.five_domains.ocr:Ocr",
        "nlp": "anyexperts_jax.data.five_domains.nlp:Nlp",
        "speech": "anyexperts_jax.data.five_domains.speech:Speech",
        "video": "anyexperts_jax.data.five_domains.video:Video",
    },
)

# data.source.FolderFormat: what reads a user's domain from a folder
SOURCES: Registry[Any] = Registry(
    "source",
    {
        "array_record": "anyexperts_jax.data.array_records:FORMAT",
        "huggingface": "anyexperts_jax.data.huggingface:FORMAT",
    },
)

# pretrained.family.Family: what reads and writes one kind of published model
FAMILIES: Registry[Any] = Registry(
    "family",
    {
        "llama": "anyexperts_jax.pretrained.llama:LLAMA",
        "qwen3": "anyexperts_jax.pretrained.qwen3:QWEN3",
        "qwen3_moe": "anyexperts_jax.pretrained.qwen3:QWEN3_MOE",
        "olmoe": "anyexperts_jax.pretrained.olmoe:OLMOE",
        "mixtral": "anyexperts_jax.pretrained.mixtral:MIXTRAL",
        "bailing_moe": "anyexperts_jax.pretrained.bailing_moe:BAILING_MOE",
        "glm4_moe": "anyexperts_jax.pretrained.glm4_moe:GLM4_MOE",
    },
)
