"""All extension points: one registry for each kind of thing that a user's own package may add.

Built-in entries are "module:attribute" strings that load on first use. So the configuration can check names against
this module without importing what they stand for.
"""

from typing import Any

from anyexperts_jax.core.registry import Registry

# routing.routers.base.Router: what computes the router's logits
ROUTERS: Registry[Any] = Registry(
    "router",
    {
        "linear": "anyexperts_jax.routing.routers.linear:LINEAR",
        "per_modality": "anyexperts_jax.routing.routers.linear:PER_MODALITY",
        "per_modality_shared": "anyexperts_jax.routing.routers.linear:PER_MODALITY_SHARED",
        "dtr": "anyexperts_jax.routing.routers.dtr:DTR",
        "dtr_shared": "anyexperts_jax.routing.routers.dtr:DTR_SHARED",
        "linear_apart": "anyexperts_jax.routing.routers.linear:LINEAR_APART",
        "markers": "anyexperts_jax.routing.routers.markers:MARKERS",
    },
)

# routing.policies.Policy: how many slots a token gets, beside "importance", which is the paper's
POLICIES: Registry[Any] = Registry(
    "policy",
    {
        "static": "anyexperts_jax.routing.policies:STATIC",
        "static_modality": "anyexperts_jax.routing.policies:STATIC_MODALITY",
        "mixed": "anyexperts_jax.routing.policies:MIXED",
        "top_p": "anyexperts_jax.routing.policies:TOP_P",
        "score_gap": "anyexperts_jax.routing.policies:SCORE_GAP",
        "threshold": "anyexperts_jax.routing.policies:THRESHOLD",
        "logit_threshold": "anyexperts_jax.routing.policies:LOGIT_THRESHOLD",
        "shuffled": "anyexperts_jax.routing.policies:SHUFFLED",
    },
)

# routing.regularisers.Regulariser: what keeps the importance, and so the budget, from drifting
REGULARISERS: Registry[Any] = Registry(
    "importance regulariser",
    {
        "logit_l2": "anyexperts_jax.routing.regularisers:logit_l2",
        "mean_target": "anyexperts_jax.routing.regularisers:mean_target",
        "salience": "anyexperts_jax.routing.regularisers:salience",
    },
)

# ops.experts.ExpertOps: what computes the experts, either on buffered rows or directly on tokens
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
        "auto": "anyexperts_jax.dispatch.auto:dispatch_auto",
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

# data.domain.Domain, as a class or a function that makes one: a family of generated questions
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

# data.scores.AnswerMetric: how right an answer is
METRICS: Registry[Any] = Registry(
    "metric",
    {
        "exact": "anyexperts_jax.data.scores:EXACT",
        "anls": "anyexperts_jax.data.scores:ANLS",
        "wer": "anyexperts_jax.data.scores:WER",
        "cer": "anyexperts_jax.data.scores:CER",
        "f1": "anyexperts_jax.data.scores:F1",
        "choice": "anyexperts_jax.data.scores:CHOICE",
        "tokens": "anyexperts_jax.data.scores:TOKENS",
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

# data.sources.rows.RowFormat: what reads the rows of a user's files; the first that knows a file of a place reads it
ROW_FORMATS: Registry[Any] = Registry(
    "row format",
    {
        "datasets": "anyexperts_jax.data.sources.datasets_folder:FORMAT",
        "media": "anyexperts_jax.data.sources.media_folder:FORMAT",
        "lines": "anyexperts_jax.data.sources.lines:FORMAT",
        "parquet": "anyexperts_jax.data.sources.parquet:FORMAT",
        "webdataset": "anyexperts_jax.data.sources.webdataset:FORMAT",
        "array_record": "anyexperts_jax.data.sources.array_record_files:FORMAT",
        "text": "anyexperts_jax.data.sources.texts:FORMAT",
    },
)

# pretrained.family.Family: what reads and writes one kind of published model
FAMILIES: Registry[Any] = Registry(
    "family",
    {
        "llama": "anyexperts_jax.pretrained.llama:LLAMA",
        "qwen3": "anyexperts_jax.pretrained.qwen3:QWEN3",
        "qwen3_moe": "anyexperts_jax.pretrained.qwen3:QWEN3_MOE",
        "zeda": "anyexperts_jax.pretrained.zeda:ZEDA",
        "qwen3_vl": "anyexperts_jax.pretrained.qwen3_vl:QWEN3_VL",
        "qwen3_vl_moe": "anyexperts_jax.pretrained.qwen3_vl:QWEN3_VL_MOE",
        "qwen3_omni_moe": "anyexperts_jax.pretrained.qwen3_omni:QWEN3_OMNI_MOE",
        "qwen3_omni_moe_thinker": "anyexperts_jax.pretrained.qwen3_omni:QWEN3_OMNI_MOE_THINKER",
        "olmoe": "anyexperts_jax.pretrained.olmoe:OLMOE",
        "mixtral": "anyexperts_jax.pretrained.mixtral:MIXTRAL",
        "bailing_moe": "anyexperts_jax.pretrained.bailing_moe:BAILING_MOE",
        "glm4_moe": "anyexperts_jax.pretrained.glm4_moe:GLM4_MOE",
        "deepseek_v3": "anyexperts_jax.pretrained.deepseek_v3:DEEPSEEK_V3",
        "longcat_flash": "anyexperts_jax.pretrained.longcat_flash:LONGCAT_FLASH",
    },
)
