"""What of a run's configuration may change when it goes on: how it computes, not what."""

from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.train.config import RunConfig, describe_differences
from anyexperts_jax.train.strict import differing_keys

# How a model's values are computed, under the keys of `ModelConfig`. None changes a parameter's shape or, where no slot
# is dropped, a value beyond rounding. A key that ends in "." stands for all below it.
EXECUTION_KEYS = ("stack.execution.", "stack.remat", "stack.scan_unroll")
# What may differ when a run goes on, under the keys of `RunConfig`: it moves neither the parameters' shapes nor the
# order of the data. With another number of steps the learning rate follows the new decay from there on.
FREE_KEYS = (
    *(f"model.{key}" for key in EXECUTION_KEYS),
    "mesh.",
    "data.tokenizer",  # a path: the tokenizer itself is told by data.token_fingerprint
    "data.threads",
    "data.max_bad_share",
    "data.prefetch",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.eval_every",
    "train.eval_examples",
    "train.keep_last",
    "train.on_nonfinite",
    "runtime.",
    "plugins",
)


def is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `keys`, or below one that ends in "."."""
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in keys)


def differing_models(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The keys in which two models compute different values, with both values; those of execution are left out."""
    return {key: values for key, values in differing_keys(ours, theirs).items() if not is_among(key, EXECUTION_KEYS)}


def require_same_run(config: RunConfig, saved: RunConfig, where: str) -> dict[str, tuple[Any, Any]]:
    """Refuses to go on from a run of another configuration; returns what differs and may.

    Raises:
      UserError: naming the keys that differ, with both values.
    """
    differences = differing_keys(config, saved)
    free = {key: values for key, values in differences.items() if is_among(key, FREE_KEYS)}
    fixed = {key: values for key, values in differences.items() if key not in free}
    shown = dict(list(fixed.items())[:6])
    more = f" and {len(fixed) - len(shown)} more" if len(fixed) > len(shown) else ""
    require(not fixed, f"{where} is of another configuration: {describe_differences(shown)}{more}")
    return free
