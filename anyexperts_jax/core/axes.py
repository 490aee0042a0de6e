"""Logical names of parameter axes: what an axis means. `sharding.rules` maps them to mesh axes."""

LOGICAL_AXES = (
    "vocab",  # tokenizer ids
    "embed",  # model width D
    "heads",  # query heads H
    "kv_heads",  # key/value heads G
    "head_dim",  # head width A
    "latent",  # a latent U of attention, as a map's output
    "from_latent",  # the same as a map's input
    "mlp",  # FFN width of dense layers, shared experts and modality encoders
    "expert",  # real experts E
    "expert_mlp",  # expert FFN width F
    "router",  # router columns C
    "modality",  # M, one slice per modality, in routers with per-modality weights
    "router_hidden",  # a hypernetwork's code Z
    "router_rank",  # rank of the maps a hypernetwork generates Q
    "importance",  # hidden width of the importance MLP
    "norm",  # scales of a norm
    "lora",  # rank of a low-rank adapter R
    "features",  # patch or audio-frame features X
    "table",  # rows of a small embedding table: modalities, places, times
    "layers",  # layers stacked by scan L
)
