"""Published checkpoints: read them, run them, write them back.

hub_config  `HubConfig`, a config.json read strictly: aliases, the homes of the rope settings, what is not supported
family      `Family`, and which one a checkpoint is of; the families are one file each, named in core.registries
rules       weight rules, tensor <-> parameter, total in both directions
sources     where tensors come from: safetensors here, GGUF in `gguf_file`
read        from a source into arrays on their devices, leaf by leaf; the table of a dry run
load        `load_pretrained`
model       `Pretrained`: logits, generation, export
random_model  a model of a published shape with random weights
write       export to the hub's layout
"""
