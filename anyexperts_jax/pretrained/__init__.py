"""Reads published checkpoints, runs them and writes them back.

hub_config  `HubConfig`, a strict reader of config.json: aliases, rope settings, keys that are not supported
family      `Family`, and how a checkpoint's family is found; each family has its own file, named in core.registries
rules       weight rules that map tensors to parameters and back, checked to be complete in both directions
sources     where tensors come from: safetensors; GGUF is in `gguf_file`
read        reads a source into arrays on their devices, one parameter at a time; also the table of a dry run
load        `load_pretrained`
model       `Pretrained`: logits, generation, export
random_model  a model with random weights from a published configuration
write       exports a model in the hub's layout
"""
