"""`Trained`, a run's checkpoint that can be measured at any window."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.devices import require_devices
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.dispatch.execution import BUFFERED
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.sharding.placement import Placement, is_split, placement_of
from anyexperts_jax.sharding.specs import batch_shards, shard_batch
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.run_dir import load_checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Configuration, parameters and expert biases [L, C] of a checkpoint, on one device or on a mesh."""

    config: RunConfig
    params: Any
    router_bias_LC: jax.Array
    step: int

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer used in training."""
        return self.sources.tokenizer

    @functools.cached_property
    def sources(self) -> Sources:
        """The data sources of the run's mixture, each opened once."""
        return Sources(self.config.data)

    @property
    def placement(self) -> Placement:
        """The devices of the parameters."""
        return placement_of(self.params)

    def whole_rows(self, rows: int) -> int:
        """Rounds `rows` up so that the mesh divides it. Batches are filled up to this number with padding rows."""
        placement = self.placement
        shards = batch_shards(placement.mesh, placement.rules)
        return round_up(rows, shards)

    def place(self, batch: Batch) -> Batch:
        """Puts a batch of `whole_rows` rows on the model's devices."""
        placement = self.placement
        return shard_batch(placement.mesh, batch, rules=placement.rules) if is_split(placement) else batch


def load_trained(run_dir: str | pathlib.Path, which: str = "best", mesh: Mesh | None = None) -> Trained:
    """Loads the run's best or last checkpoint onto `mesh`, or onto the first device, whatever it was trained on.

    The run may still be training: one consistent checkpoint is loaded, with its own step.

    Raises:
      UserError: if there is no run or checkpoint, a checkpoint or a recorded validation loss is damaged, or the mesh
        does not divide the model.
    """
    require_devices()
    found = load_checkpoint(run_dir, which, mesh)
    return Trained(found.config, found.params, found.router_bias_LC, found.step)


def require_experts(config: RunConfig, what: str) -> None:
    """Checks that the run's model has experts.

    Raises:
      UserError: that begins with `what`, if the model has no MoE layer.
    """
    require(config.model.stack.num_moe_layers > 0, f"{what}: the run's model is dense and routes nothing")


def own_window(moe: AnyExpertsConfig) -> tuple[float, float]:
    return (moe.k_min, moe.k_max)


def with_room(config: ModelConfig, k_max: float) -> ModelConfig:
    """Returns the model's configuration with slot arrays wide enough for `k_max`, or as wide as its experts allow.

    Its own window moves up as well; `at_window` sizes buffers for the window in force. The parameters fit both.
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


def at_window(config: ModelConfig, window: tuple[float, float]) -> ModelConfig:
    """Returns the configuration to run at `window`, so that measurements do not depend on other windows of a command.

    The size of dispatch's buffers ("capacity", "exchange") follows the configuration's own budget, so with these the
    configuration gets the window as its own, and each window needs its own program. With other dispatches the
    configuration is unchanged, and one program serves all windows.

    Raises:
      UserError: if the model cannot have the window.
    """
    if config.stack.execution.dispatch not in BUFFERED:
        return config
    moe = dataclasses.replace(config.moe, k_min=float(window[0]), k_max=float(window[1]))
    return dataclasses.replace(config, moe=moe)
