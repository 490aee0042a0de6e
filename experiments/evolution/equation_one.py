"""Shows on a one-second problem what EvoMoE's equation (1) does to the evolved experts.

    python experiments/evolution/equation_one.py        # writes results/evolution_equation_one.{json,md}

Expert 1, a SwiGLU of 16 inputs and 32 units, learns a random network of the same form from noisy answers by AdamW;
experts 2 to 4 follow it. Everything is relative to expert 1's total drift |theta_1(end) - theta_1(0)|.
"""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anyexperts_jax.evolution.config import EvolutionConfig
from anyexperts_jax.evolution.evolve import expert_evolution

RESULTS = pathlib.Path(__file__).parents[1] / "results"
D, F, BATCH, EXPERTS, NOISE, LR = 16, 32, 64, 4, 0.3, 3e-3
MARKS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)  # shares of the run at which distances are recorded

# Name -> (fields of EvolutionConfig, learning rate at the end over its highest)
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "ema, cosine to zero": ({}, 0.0),
    "ema, floor 0.1": ({}, 0.1),
    "ema, floor 0.5": ({}, 0.5),
    "ema, constant rate": ({}, 1.0),
    "ema, cosine to zero, snapshots": ({"snapshots": (0.25, 0.5, 0.75)}, 0.0),
    "lag, cosine to zero": ({"mode": "lag"}, 0.0),
    "literal, cosine to zero": ({"mode": "literal"}, 0.0),
    "ema, beta 0": ({"fixed_beta": 0.0}, 0.0),
    "literal, beta 0": ({"mode": "literal", "fixed_beta": 0.0}, 0.0),
}


def ffn(weights: dict[str, jax.Array], x_BD: jax.Array) -> jax.Array:
    """Returns the output [B, D] of one expert's SwiGLU."""
    return (jax.nn.silu(x_BD @ weights["gate"]) * (x_BD @ weights["up"])) @ weights["down"]


def random_ffn(key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {
        name: jax.random.normal(k, shape) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@functools.cache
def run(case: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """Returns distances from expert 1 at MARKS and each expert's final loss (teacher 0, untrained about 0.5)."""
    fields, floor = CASES[case]
    teacher = random_ffn(jax.random.key(seed))
    start = random_ffn(jax.random.key(seed + 1))
    params = jax.tree.map(lambda w: jnp.broadcast_to(w, (EXPERTS, *w.shape)), start)
    rate = optax.cosine_decay_schedule(LR, steps, alpha=floor)
    optimizer = expert_evolution(
        optax.adamw(rate, weight_decay=0.0),
        EvolutionConfig(**fields),
        num_experts=EXPERTS,
        steps=steps,
        key=jax.random.key_data(jax.random.key(seed)),
        axis=0,
    )

    def loss(params: Any, key: jax.Array) -> jax.Array:
        """Returns the loss of expert 1."""
        x_BD = jax.random.normal(key, (BATCH, D))
        answer_BD = ffn(teacher, x_BD) + NOISE * jax.random.normal(jax.random.fold_in(key, 1), (BATCH, D))
        return jnp.mean((ffn(jax.tree.map(lambda w: w[0], params), x_BD) - answer_BD) ** 2)

    def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(seed + 2), index))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count with floats
            updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        squares_E = sum(((w - w[:1]) ** 2).sum((1, 2)) for w in jax.tree.leaves(params))
        return (params, state), jnp.sqrt(squares_E)

    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps)))
    (end, _), distances_TE = train(params)
    drift = np.sqrt(
        sum(float(((w[0] - s) ** 2).sum()) for w, s in zip(*map(jax.tree.leaves, (end, start)), strict=True))
    )
    x_BD = jax.random.normal(jax.random.key(seed + 3), (4096, D))
    errors = [
        float(jnp.mean((ffn(jax.tree.map(lambda w, n=n: w[n], end), x_BD) - ffn(teacher, x_BD)) ** 2))
        for n in range(EXPERTS)
    ]
    rows = [max(1, round(mark * steps)) - 1 for mark in MARKS]
    return {"distance": (np.asarray(distances_TE)[rows, 1:] / drift).tolist(), "loss": errors, "drift": float(drift)}


def table(results: dict[str, Any], steps: int, command: str) -> str:
    """Returns the result as Markdown."""
    lines = [
        "# Equation (1) of EvoMoE: what the evolved experts become",
        "",
        f"`{command}`: {steps} steps, lr {LR} by cosine, AdamW, one seed; CPU. Mean distance of experts 2 to 4 from",
        "expert 1 over expert 1's total drift, at shares of the run; squared error to the teacher of expert 1, and of",
        "experts 2 to 4.",
        "",
        "| case | " + " | ".join(f"{mark:.0%}" for mark in MARKS) + " | error 1 | errors 2 to 4 |",
        "|---" * (len(MARKS) + 3) + "|",
    ]
    for case, found in results.items():
        distances = " | ".join(f"{np.mean(row):.1e}" for row in found["distance"])
        others = ", ".join(f"{loss:.3f}" for loss in found["loss"][1:])
        lines.append(f"| {case} | {distances} | {found['loss'][0]:.3f} | {others} |")
    lines += [
        "",
        "- With beta = 0 the literal form leaves raw gradients, useless as experts, where the paper's row with",
        "  beta = 0 equals expert 1, as the moving average does but for rounding. With its own betas the literal form",
        "  is expert 1 scaled down, the less beta the worse: the gradient is too small to matter.",
        "- A moving average ends where expert 1 stopped when the rate falls to zero. A floor under the rate keeps the",
        "  experts apart by what expert 1 moves in the average's memory; snapshots keep them where they were taken.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    steps = 3000
    results = {case: run(case, steps) for case in CASES}
    command = "python experiments/evolution/equation_one.py"
    content = {"command": command, "steps": steps, "marks": MARKS, "results": results}
    (RESULTS / "evolution_equation_one.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(results, steps, command)
    (RESULTS / "evolution_equation_one.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
