"""AdamW with gradient clipping, warm-up, cosine decay, and weight decay on matrices only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._select import platform


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser.

    Raises:
      UserError: naming the value that is out of range.
    """

    lr: float = 1e-3  # peak learning rate, after the warm-up
    warmup_steps: int = 100  # steps over which the learning rate rises linearly from 0
    final_lr_fraction: float = 0.1  # learning rate at the last step as a fraction of lr
    weight_decay: float = 0.01  # decoupled, times the learning rate; not on norms, biases and other vectors
    b1: float = 0.9  # decay per step of the mean of gradients
    b2: float = 0.95  # decay per step of the mean of squared gradients
    eps: float = 1e-8  # added to the root of the mean of squared gradients
    clip_norm: float = 1.0  # the largest global norm of the gradient; longer ones are scaled down

    def __post_init__(self) -> None:
        check_field_types(self, "optim.")
        for name in ("lr", "eps", "clip_norm"):
            value = getattr(self, name)
            require(value > 0, f"optim.{name}={value} must be > 0")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name}={value} must be >= 0")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value} must be in [0, 1)")
        fraction = self.final_lr_fraction
        require(0 <= fraction <= 1, f"optim.final_lr_fraction={fraction} must be in [0, 1]")


def learning_rate(config: OptimConfig, steps: int, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The learning rate of step number `step`, 0 to steps - 1: linear warm-up, then cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.lr / max(config.warmup_steps, 1),  # not 0: the first step would be wasted
        peak_value=config.lr,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.lr * config.final_lr_fraction,
    )
    with jax.numpy_dtype_promotion("standard"):  # optax mixes the integer step with floats
        return jnp.asarray(schedule(step), jnp.float32)


def decays(logical_axes: tuple[str, ...]) -> bool:
    """Whether weight decay applies to a parameter: to matrices, but not to norms, biases and other per-layer
    vectors."""
    return len([axis for axis in logical_axes if axis not in ("layers", "modality")]) >= 2


def clip(grads: Any, norm: float) -> Any:
    """Clips the gradient to a global norm of `norm`. Multiplies by one factor, where optax divides and multiplies: XLA
    stores quotients in memory, but recomputes products where they are used."""
    factor = jnp.minimum(1.0, norm / optax.tree.norm(grads))
    return jax.tree.map(lambda g: factor.astype(g.dtype) * g, grads)


def make_optimizer(config: OptimConfig, logical_axes: Any, scales: Any = None) -> optax.GradientTransformationExtraArgs:
    """AdamW. Its `update` takes `learning_rate`, because the rate depends on the step count including skipped steps,
    and `finite`: if that is False, the state does not change and the updates are meaningless.

    Moments are float32 whatever the gradients' dtype. Parameters that are None (see `train.frozen`) have no moments.

    Args:
      scales: a tree of numbers, by which each parameter's learning rate is multiplied; None: 1 for all.
    """
    mask = jax.tree.map(decays, logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    direction = optax.chain(
        optax.stateless(lambda grads, _: clip(grads, config.clip_norm)),
        _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
    )

    def update(
        grads: Any, state: Any, params: Any = None, *, learning_rate: Array | float, finite: Array | bool = True
    ) -> tuple[Any, Any]:
        # optax raises b1 to the integer count, and adds the decay of bfloat16 parameters to float32 updates.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = direction.update(grads, state, params, finite=finite)
        if scales is None:
            return jax.tree.map(lambda u: -learning_rate * u, updates), state
        return jax.tree.map(lambda u, scale: (-scale * learning_rate) * u, updates, scales), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`. It adds float32 updates to bfloat16 parameters by promotion, then rounds the sum."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def _adam(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """optax's Adam, except that the state does not change if `finite` is False, and that the direction is computed from
    the moments in the new state.

    On a CPU, XLA would otherwise compute the moments twice and copy the old ones, although they are replaced in place.
    On accelerators one pass updates moments and parameters.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)

    def update(grads: Any, state: Any, params: Any = None, *, finite: Array | bool) -> tuple[Any, Any]:
        _, updated = adam.update(grads, state, params)
        updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        if platform() == "cpu":
            updated = jax.lax.optimization_barrier(updated)
        mean = optax.tree.bias_correction(updated.mu, config.b1, updated.count)
        square = optax.tree.bias_correction(updated.nu, config.b2, updated.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mean, square), updated

    def init(params: Any) -> Any:
        return adam.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    return optax.GradientTransformationExtraArgs(init, update)
