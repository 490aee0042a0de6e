"""A run's checkpoint, ready to be measured at any window."""

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
        """The one it was trained with."""
        return self.sources.tokenizer

    @functools.cached_property
    def sources(self) -> Sources:
        """The data of its mixture, each opened once."""
        return Sources(self.config.data)

    @property
    def placement(self) -> Placement:
        """Where the arrays are."""
        return placement_of(self.params)

    def whole_rows(self, rows: int) -> int:
        """`rows`, rounded up to what the mesh splits evenly. Padding rows fill every batch up to this number."""
        placement = self.placement
        shards = batch_shards(placement.mesh, placement.rules)
        return -(-rows // shards) * shards

    def place(self, batch: Batch) -> Batch:
        """Puts a batch of `whole_rows` rows on the devices of the model."""
        placement = self.placement
        return shard_batch(placement.mesh, batch, rules=placement.rules) if is_split(placement) else batch


def load_trained(run_dir: str | pathlib.Path, which: str = "best", mesh: Mesh | None = None) -> Trained:
    """The run's best or last checkpoint, on `mesh` or else on the first device, whatever it was trained on.

    The run may still be training: one consistent checkpoint is loaded, with its own step.

    Raises:
      UserError: when there is no run or checkpoint, when a checkpoint or a recorded validation loss is damaged, or when
        the model does not split over the mesh.
    """
    require_devices()
    found = load_checkpoint(run_dir, which, mesh)
    return Trained(found.config, found.params, found.router_bias_LC, found.step)


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
    """The configuration to run at `window`, so that what is measured there depends on no other window of the command.

    Where dispatch has buffers ("capacity", "exchange") their size follows the configuration's own budget, so it gets
    the window as its own: one program for each window. Elsewhere it stays, and one program serves all windows.

    Raises:
      UserError: when the model cannot have the window.
    """
    if config.stack.execution.dispatch not in BUFFERED:
        return config
    moe = dataclasses.replace(config.moe, k_min=float(window[0]), k_max=float(window[1]))
    return dataclasses.replace(config, moe=moe)
