"""The network that computes each token's importance logit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.switches import ImportanceMLP as Form
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.norms import RMSNorm


class ImportanceMLP(nn.Module):
    """RMSNorm, Linear(D / 4), SiLU, Linear(1), in float32 (AnyExperts section 2, step 1; the sizes are our reading).

    "wide" has four times the hidden width, "deep" two more hidden layers. The last map starts at zero, so that every
    token starts with importance 1/2.

    For bfloat16 tokens the float32 matmuls use precision HIGH: three bfloat16 products on a TPU, one TF32 product on a
    GPU. That is no coarser than the tokens. With HIGHEST, six products, as for float32 tokens, this network would cost
    a fourth of the paper's eight experts.
    """

    form: Form = "default"
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        width = max(1, x_BTD.shape[-1] // 4) * (4 if self.form == "wide" else 1)
        precision = jax.lax.Precision.HIGH if x_BTD.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

        def linear(out_shape: tuple[int, ...], axes: tuple[str, ...], scale: float, name: str) -> Linear:
            return Linear(out_shape, axes, use_bias=True, scale=scale, precision=precision, name=name)

        hidden = RMSNorm(self.norm_eps, name="norm")(x_BTD.astype(jnp.float32))
        for i in range(3 if self.form == "deep" else 1):
            axes = ("importance" if i else "embed", "importance")
            hidden = jax.nn.silu(linear((width,), axes, 1.0, f"hidden_{i}")(hidden))
        return linear((), ("importance",), 0.0, "out")(hidden)
