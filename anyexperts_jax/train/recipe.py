"""`Recipe`: where a run departs from training every parameter of its model from scratch."""

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
    """Hooks of the training loop; what is None is as `train` does it by default.

    A run that goes on must have the recipe it began with: the state in its checkpoints is the optimizer's.
    """

    start: Callable[[Mesh], Any] | None = None  # the first step's parameters, in their places on the mesh
    trainable: Any = None  # a tree of bools over the parameters, for which `optimizer` must be made (train.frozen)
    optimizer: optax.GradientTransformationExtraArgs | None = None  # its `update` takes learning_rate
    apply: Callable[[ModelConfig, Placement], Apply] | None = None  # the model as the loss sees it
    measure: Callable[[TrainState, Validation], dict[str, Any]] | None = None  # more of each validation record
    begin: Callable[[], None] | None = None  # called once all is checked, before the run's first file is written


EVERYTHING = Recipe()  # every parameter of the model, from scratch
