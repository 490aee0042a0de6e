"""The configuration keys that may change when a run is resumed: how it computes, not what it computes."""

from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.train.config import RunConfig, describe_differences
from anyexperts_jax.train.strict import differing_keys

# Keys of `ModelConfig` that say how values are computed. They change neither the shape of a parameter nor, unless slots
# are dropped, a value beyond rounding. A key that ends in "." stands for all keys below it.
EXECUTION_KEYS = ("stack.execution.", "stack.remat", "stack.scan_unroll")
# Keys of `RunConfig` that may change when a run is resumed: they change neither the shapes of parameters nor the order
# of the data. With another number of steps the learning rate follows the new decay from there on.
FREE_KEYS = (
    *(f"model.{key}" for key in EXECUTION_KEYS),
    "mesh.",
    "data.tokenizer",  # only a path: data.token_fingerprint identifies the tokenizer
    "data.metrics",  # how answers are scored, not what is learned
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
    """Whether a dotted key is in `keys`, or below one of them that ends in "."."""
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in keys)


def differing_models(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The differing keys of two models that compute different values, with both values; execution keys do not count."""
    return {key: values for key, values in differing_keys(ours, theirs).items() if not is_among(key, EXECUTION_KEYS)}


def require_same_run(config: RunConfig, saved: RunConfig, where: str) -> dict[str, tuple[Any, Any]]:
    """Checks that a run can be resumed with this configuration; returns the allowed differences.

    Raises:
      UserError: naming the other keys that differ, with both values.
    """
    differences = differing_keys(config, saved)
    free = {key: values for key, values in differences.items() if is_among(key, FREE_KEYS)}
    fixed = {key: values for key, values in differences.items() if key not in free}
    shown = dict(list(fixed.items())[:6])
    more = f" and {len(fixed) - len(shown)} more" if len(fixed) > len(shown) else ""
    require(not fixed, f"{where} is of another configuration: {describe_differences(shown)}{more}")
    return free
