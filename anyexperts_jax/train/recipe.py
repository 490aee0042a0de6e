"""`Recipe`: how a run differs from training every parameter of its model from scratch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.step import Apply
from anyexperts_jax.train.validation import Validation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hooks of the training loop; None keeps the default of `train`.

    A run must be resumed with the recipe it was started with, because its checkpoints have the optimizer's state.
    """

    start: Callable[[Mesh], Any] | None = None  # makes the initial parameters, sharded on the mesh
    trainable: Any = None  # a tree of bools over the parameters; `optimizer` must be made for it (train.frozen)
    optimizer: optax.GradientTransformationExtraArgs | None = None  # its `update` takes learning_rate
    apply: Callable[[ModelConfig, Placement], Apply] | None = None  # makes the function that the loss applies
    measure: Callable[[TrainState, Validation], dict[str, Any]] | None = None  # more fields for validation records
    begin: Callable[[], None] | None = None  # called after all checks, before the run writes its first file

    @property
    def says_what_trains(self) -> bool:
        """Whether the recipe decides which parameters are trained, instead of `train.trainable`."""
        return self.trainable is not None or self.optimizer is not None


EVERYTHING = Recipe()  # trains every parameter of the model from scratch
