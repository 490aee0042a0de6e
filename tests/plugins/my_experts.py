"""What a user's own package might hold: one thing of every kind that a registry takes."""

import csv

import jax.numpy as jnp

import anyexperts_jax as ax
from anyexperts_jax.data.scores import AnswerMetric
from anyexperts_jax.ops.expert_ops.plain import REFERENCE
from anyexperts_jax.routing.policies import Policy


def _params(config, d_model, columns):
    return {"bias": ax.Param((columns,), ("router",), ax.Normal(0.1))}


def _logits(config, params, x_ND, modality_N):
    """Every token likes the same experts, and its own size decides how much."""
    size_N1 = jnp.linalg.norm(x_ND.astype(jnp.float32), axis=1, keepdims=True)
    return size_N1 * params["bias"][None]


ax.ROUTERS.register("by_size", ax.Router(_params, _logits))


def near_half(seen):
    """|w - 1/2|, summed in place of averaged."""
    return seen.weights_NK, jnp.where(seen.valid_N, jnp.abs(seen.importance_N - 0.5), 0).sum()


ax.REGULARISERS.register("near_half", near_half)


def loop_over_experts(x_ND, plan, experts, execution, placement=None):
    """Every expert in turn on all tokens, in plain Python: slow, short and exact."""
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    for e in range(plan.spec.num_experts):
        own = ax.ExpertWeights(*(weight[e : e + 1] for weight in experts))
        counts_1 = jnp.full(1, x_ND.shape[0], jnp.int32)
        y_1ND = ax.expert_mlp(x_ND[None], counts_1, *own, **execution.op_options)
        weight_N = jnp.where(plan.expert_ids_NK == e, plan.weights_NK, 0).sum(axis=1)
        y_ND += weight_N[:, None] * y_1ND[0].astype(jnp.float32)
    rows = jnp.int32(plan.spec.num_experts * x_ND.shape[0])
    return y_ND, ax.DispatchStats(dropped=jnp.int32(0), rows=rows)


ax.DISPATCHERS.register("loop_over_experts", loop_over_experts)
ax.IMPLEMENTATIONS.register("mine", ax.ExpertOps(REFERENCE.expert_mlp, REFERENCE.routed_mlp))


class Coins:
    """How many coins: a domain of text alone."""

    name = "coins"
    question_types = ("count",)
    metric = "exact"

    def example(self, split, index, seed=0, levels=(1, 2, 3)):
        rng, level = ax.example_generator(self.name, split, index, seed, levels)
        count = int(rng.integers(1, 10))
        question = f"{'o' * count}: how many?"
        return ax.Example(self.name, "count", level, question, str(count), f"{split}:{count}")


ax.DOMAINS.register("coins", Coins)


class Pairs:
    """Questions and answers, a line each."""

    question_types = ("any",)
    metric = "exact"

    def __init__(self, folder, split):
        with open(folder / f"{split}.csv", newline="") as file:
            self.rows = list(csv.reader(file))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        question, answer = self.rows[index]
        return ax.Example("pairs", "any", 1, question, answer, f"line:{index}")


ax.SOURCES.register("pairs", ax.FolderFormat("train.csv", lambda folder: (folder / "train.csv").is_file(), Pairs))


def more_for_the_unsure(seen, dial):
    return dial + jnp.where(seen.scores_NE.max(axis=1) < 0.5, 1.0, 0.0)


ax.POLICIES.register("more_for_the_unsure", Policy(more_for_the_unsure, (1.0, 8.0)))


def first_letter(prediction, answer):
    return float(prediction[:1] == answer[:1])


ax.METRICS.register("first_letter", AnswerMetric("first letter", first_letter))
