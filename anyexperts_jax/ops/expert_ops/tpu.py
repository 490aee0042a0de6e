"""The Pallas kernels for TPUs."""

from jaxtyping import Array

from anyexperts_jax.ops.expert_mlp.vjp_tpu import LANES, TpuOptions, expert_mlp_pallas_tpu
from anyexperts_jax.ops.expert_ops.plain import with_residuals
from anyexperts_jax.ops.experts import ExpertOps, InPlace
from anyexperts_jax.ops.routed_mlp.tpu import routed_mlp_in_place, routed_mlp_pallas_tpu


def _expert_mlp(*operands: Array, residuals: str) -> Array:
    return expert_mlp_pallas_tpu(*operands, options=TpuOptions(residuals=residuals))


PALLAS_TPU = ExpertOps(_expert_mlp, with_residuals(routed_mlp_pallas_tpu), InPlace(routed_mlp_in_place, multiple=LANES))
