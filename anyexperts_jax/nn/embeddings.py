"""Embedding tables."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.initializers import Normal
from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.params import named
from anyexperts_jax.ops.contraction import Contraction, dot_of_rows
from anyexperts_jax.sharding.activations import take_embeddings
from anyexperts_jax.sharding.placement import Placement


class Embedding(nn.Module):
    """A table of `num_rows` learned vectors. An id out of range gives NaN, so that it cannot go unnoticed."""

    num_rows: int
    features: int
    axis: str = "table"  # logical name of the rows
    std: float = 1.0
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # where the arrays lie; None: on one device
    id_axes: tuple[str, ...] = ("batch", "length")  # logical axes of the ids, for the placement

    def setup(self) -> None:
        init = named(Normal(self.std), (self.axis, "embed"))
        self.table = self.param("table", init, (self.num_rows, self.features), jnp.dtype(self.param_dtype))

    def __call__(self, ids: Int[Array, "*rest"]) -> Float[Array, "*rest D"]:
        return take_embeddings(self.table, ids, self.placement, self.id_axes).astype(self.dtype)

    def logits(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest Y"]:
        """Inner products with all rows (a tied output head), accumulated in float32."""
        return dot_of_rows(x, self.table, (1,), Contraction(dtype=self.dtype))
