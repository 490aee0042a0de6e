"""Measures whether a decode step takes time in proportion to the experts that it hits.

    python -m experiments.bench.pretrained_experts [--rounds 8]

A mixture of random weights, 128 experts in each of two layers, decodes at several budgets; the experts that a step
hits are counted from its router. Writes `experiments/results/pretrained_experts.md`.
"""

import argparse
import pathlib
import statistics
import sys
from typing import Any

import numpy as np

from anyexperts_jax.bench.output import environment, markdown
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.pretrained.budget import with_budget
from anyexperts_jax.pretrained.decode import Request, Weights, decode
from anyexperts_jax.pretrained.random_model import random_model

RESULTS = pathlib.Path(__file__).parents[1] / "results"
LAYERS, EXPERTS, STEPS = 2, 128, 16
SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rope_theta": 1e6,
}
PAGE = "pretrained_experts.md"
BUDGETS, ROWS = (1, 2, 4, 8, 16, 32), (1, 8)


def step_seconds(model: Any, budget: int, prompts: np.ndarray) -> float:
    config, in_force = with_budget(model.config, budget)
    weights = Weights(config, model.placement, model.params, None)
    rows = [list(map(int, row)) for row in prompts]
    found = decode(weights, rows, Request(STEPS + 1), in_force, lambda row, token: True)
    return found.decode_seconds / found.steps


def experts_hit(model: Any, budget: int, prompts: np.ndarray) -> float:
    """Returns the mean number of distinct experts per layer for the prompts' last tokens, as in one decode step."""
    ids_LBTK = np.asarray(model.forward(prompts, budget=budget).trace.expert_ids_BTK)
    hit = [len(np.unique(own[own < EXPERTS])) for t in range(prompts.shape[1]) for own in ids_LBTK[:, :, t]]
    return float(np.mean(hit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="of all budgets in turn (default: 8)")
    options = parser.parse_args()
    machine, model = environment(options.rounds), random_model(SHAPE)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (max(ROWS), 16))
    rows = []
    for count in ROWS:
        prompts, seconds = ids[:count], {budget: [] for budget in BUDGETS}
        for budget in BUDGETS:
            step_seconds(model, budget, prompts)  # compiles
        for _ in range(options.rounds):
            for budget in BUDGETS:
                seconds[budget].append(step_seconds(model, budget, prompts))
        times = {budget: statistics.median(own) for budget, own in seconds.items()}
        hit = {budget: experts_hit(model, budget, prompts) for budget in BUDGETS}
        most = BUDGETS[-1]
        for budget in BUDGETS:
            figures = (f"{hit[budget]:.1f}", f"{hit[budget] / hit[most]:.2f}", f"{times[budget] / times[most]:.2f}")
            rows.append((str(count), str(budget), *figures))
            print(*rows[-1], file=sys.stderr, flush=True)
            write(options.rounds, machine, rows)
    print((RESULTS / PAGE).read_text())


def write(rounds: int, machine: dict[str, Any], rows: list[tuple[str, ...]]) -> None:
    """Writes the page of the measurements so far."""
    columns = ("rows", "budget", "experts hit", f"over those at {BUDGETS[-1]}", "time over that")
    title = f"A step of decoding: {EXPERTS} experts of 1024 x 384 in each of {LAYERS} layers, float32"
    command = f"python -m experiments.bench.pretrained_experts --rounds {rounds}"
    table = TextTable(title, columns, tuple(rows), names=2)
    (RESULTS / PAGE).write_text(markdown("Decoding and the experts hit", command, machine, [table]))


if __name__ == "__main__":
    main()
