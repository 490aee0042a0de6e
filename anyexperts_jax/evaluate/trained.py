"""A run's checkpoint, ready to be measured at any window."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.devices import require_devices
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.store import open_tokenizer
from anyexperts_jax.train.checkpoint import Checkpoints
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.run_dir import RunDir, load_run


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Configuration, parameters and expert biases [L, C] of a checkpoint."""

    config: RunConfig
    params: Any
    router_bias_LC: jax.Array
    step: int

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one it was trained with."""
        return open_tokenizer(self.config.data.tokenizer)


def load_trained(run_dir: str | pathlib.Path, which: str = "best") -> Trained:
    """The run's best or last checkpoint, on the first device.

    Raises:
      UserError: when there is no run or no checkpoint, or it or the validation loss of any is unreadable.
    """
    require_devices()
    config, params, router_bias_LC = load_run(run_dir, which)
    checkpoints = Checkpoints(RunDir(pathlib.Path(run_dir)).checkpoints, read_only=True)
    step = checkpoints.best if which == "best" else checkpoints.latest
    checkpoints.close()
    assert step is not None  # load_run found one
    return Trained(config, params, router_bias_LC, step)


def require_experts(config: RunConfig, what: str) -> None:
    """Refuses `what` of a dense model, which routes nothing.

    Raises:
      UserError: when the run's model has no MoE layer.
    """
    require(config.model.stack.num_moe_layers > 0, f"{what}: the run's model is dense and routes nothing")


def own_window(moe: AnyExpertsConfig) -> tuple[float, float]:
    return (moe.k_min, moe.k_max)


def with_room(config: ModelConfig, k_max: float) -> ModelConfig:
    """The same model with slot arrays wide enough for windows up to `k_max`, or as wide as its experts allow.

    Its own window moves up with it, so that capacity buffers are sized for the largest budget. Parameters fit both.
    """
    moe = config.moe
    if k_max <= moe.k_max:
        return config
    for top in range(math.ceil(k_max), math.ceil(moe.k_max), -1):
        try:
            shifted = dataclasses.replace(moe, k_min=top - (moe.k_max - moe.k_min), k_max=top)
            return dataclasses.replace(config, moe=shifted)
        except UserError:
            continue  # more slots than columns or experts in reach
    return config
