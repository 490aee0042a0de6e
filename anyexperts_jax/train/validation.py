"""Teacher-forced evaluation on every domain's validation examples during training."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.pipeline import eval_batches
from anyexperts_jax.sharding.specs import batch_rows, replicated, shard_batch
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.frozen import overlay
from anyexperts_jax.train.metrics import routing_means
from anyexperts_jax.train.objective import BatchSums, Objective
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.step import Apply, make_eval_step


def require_validation_examples(config: RunConfig, sources: Sources) -> None:
    """Opens the validation split of every domain, so that a run without one fails before its first step.

    If a split that was held out by hash has fewer examples than `train.eval_examples`, all of them are used.

    Raises:
      UserError: if a folder has no validation split, or its own split has fewer examples than `train.eval_examples`.
    """
    examples = config.train.eval_examples
    for name in config.data.domains:
        try:
            source = sources.open(name, "validation")
            if not getattr(source, "held_out", False):
                sources.open(name, "validation", examples)
        except UserError as error:
            needed = f"a run needs {examples} validation examples of {name} (train.eval_examples)"
            raise UserError(f"{error}; {needed}") from error


class Validation:
    """Evaluates on `train.eval_examples` validation examples of each domain, the same ones at every call."""

    def __init__(
        self,
        config: RunConfig,
        apply: Apply,
        mesh: Mesh,
        sources: Sources | None = None,
        waiting: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
    ) -> None:
        """
        Args:
          sources: the sources of `config.data`, if the caller has opened them already; None: opens them.
          waiting: makes the context in which this process waits for the others.
        """
        self._config = config
        self._sources = sources or Sources(config.data)
        self._waiting = waiting
        self.mesh = mesh
        self._objective = Objective.of(config.train)
        self._step = jax.jit(make_eval_step(apply, self._objective), out_shardings=replicated(mesh))
        self._batches: dict[str, list[Batch]] = {}

    def of(self, apply: Apply) -> "Validation":
        """A validation of another model on the same examples."""
        other = Validation(self._config, apply, self.mesh, self._sources, self._waiting)
        other._batches = self._batches
        return other

    @property
    def _pairs(self) -> bool:
        return self._objective.beta is not None

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """The record of an evaluation: "loss" (nats per answer token, averaged over domains), "domains" with each
        domain's loss, token_accuracy and exact_match, and the routing over all domains.

        With `train.loss="dpo"` the loss is that per pair, the other scores are of the better answers, and there are
        answer_loss, reward_margin and preference_accuracy beside them."""
        sums = {name: self._sums(name, state) for name in self._config.data.domains}
        domains = {name: _scores(each) for name, each in sums.items()}
        routing = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *(each.routing for each in sums.values()))
        return {
            "loss": float(np.mean([scores["loss"] for scores in domains.values()])),
            "domains": domains,
            **routing_means(self._config.model.moe, routing),
        }

    def _sums(self, name: str, state: TrainState) -> BatchSums:
        if name not in self._batches:  # made once: rendering and speech synthesis take longer than the model's step
            data, train = self._config.data, self._config.train
            rows = batch_rows(self.mesh, train.batch_size)
            there = self._sources.count(name, "validation", train.eval_examples)
            how: dict[str, Any] = {"rows": rows, "sources": self._sources, "pairs": self._pairs}
            made = eval_batches(data, name, "validation", train.batch_size, there, **how)
            self._batches[name] = list(made)
        size = self._config.train.batch_size
        reference = overlay(state.opt_state.teacher, state.params) if self._pairs else None
        parts = [
            self._step(state.params, state.router_bias_LC, shard_batch(self.mesh, batch, size), reference=reference)
            for batch in self._batches[name]
        ]
        with self._waiting(f"the validation of {name}"):
            return jax.device_get(jax.tree.map(lambda *leaves: jnp.stack(leaves).sum(axis=0), *parts))


def _scores(sums: BatchSums) -> dict[str, float]:
    tokens, answers = max(int(sums.answer_tokens), 1), max(int(sums.answers), 1)
    scores = {
        "loss": float(sums.answer_loss) / tokens,
        "token_accuracy": int(sums.correct_tokens) / tokens,
        "exact_match": int(sums.exact_answers) / answers,
        "examples": int(sums.answers),
    }
    if sums.preference is None:
        return scores
    pairs, found = max(int(sums.preference.pairs), 1), sums.preference
    return {
        **scores,
        "loss": float(found.loss) / pairs,
        "answer_loss": scores["loss"],
        "reward_margin": float(found.margin) / pairs,
        "preference_accuracy": int(found.right) / pairs,
    }
