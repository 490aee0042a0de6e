"""The Pallas kernels for NVIDIA GPUs: Mosaic GPU on Hopper, and Triton."""

from collections.abc import Callable

from jaxtyping import Array

from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions
from anyexperts_jax.ops.expert_mlp.pallas_gpu import WIDTH_MULTIPLE
from anyexperts_jax.ops.expert_mlp.vjp_gpu import expert_mlp_mosaic, expert_mlp_triton
from anyexperts_jax.ops.expert_ops.plain import with_residuals
from anyexperts_jax.ops.experts import ExpertOps, InPlace
from anyexperts_jax.ops.routed_mlp.gpu import mosaic_in_place, routed_mlp_mosaic, routed_mlp_triton, triton_in_place


def _with_options(run: Callable[..., Array]) -> Callable[..., Array]:
    def op(*operands: Array, residuals: str) -> Array:
        return run(*operands, options=GpuOptions(residuals=residuals))

    return op


PALLAS_GPU = ExpertOps(
    _with_options(expert_mlp_mosaic),
    with_residuals(routed_mlp_mosaic),
    InPlace(mosaic_in_place, multiple=WIDTH_MULTIPLE),
)
PALLAS_TRITON = ExpertOps(_with_options(expert_mlp_triton), with_residuals(routed_mlp_triton), InPlace(triton_in_place))
