"""The dynamic token-aware router (EvoMoE, arXiv 2505.23830, equations 5 to 8).

For each token z, the hypernetwork of its modality m generates a low-rank network that maps z to an embedding E, which
phi, shared by all modalities, scores. With the code c = W1 z + b1 (Z wide, optionally through a GELU):

    Theta_down = c W2_down + b2_down  [D, 2Q]    Theta_up = c W2_up + b2_up  [Q, D]
    a = silu(gate) * up, (gate, up) = z Theta_down    rho = phi(a Theta_up)

The Thetas are never materialised. Both are linear in c, so z is multiplied with W2_down before c is: N x Z x 2Q
numbers instead of N x D x 2Q. And phi is linear, so it is multiplied with W2_up before the tokens are: a matmul of
Z Q x C instead of Z Q x D. Both reorderings are exact. The paper does not give its sizes; ours are a reading.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.initializers import Constant, FanIn, Param
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.routing.routers.base import Params, Router, with_shared

_EXACT = jax.lax.Precision.HIGHEST


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypernetworks:
    """The weights of M hypernetworks H^m, float32."""

    encode_MDZ: Float[Array, "*M D Z"]  # W1
    encode_bias_MZ: Float[Array, "*M Z"]  # b1
    down_MZDW: Float[Array, "*M Z D W"]  # W2_down; W = 2Q: the columns of gate, then those of up
    down_bias_MDW: Float[Array, "*M D W"]  # b2_down
    up_MZQD: Float[Array, "*M Z Q D"]  # W2_up
    up_bias_MQD: Float[Array, "*M Q D"]


def dtr_logits(
    x_ND: Float[Array, "N D"],
    modality_N: Int[Array, "N"],
    hypernetworks: Hypernetworks,
    phi_DC: Float[Array, "D C"],
    *,
    gelu: bool = False,
) -> Float[Array, "N C"]:
    """Router logits rho [N, C], float32, without the softmax.

    The hypernetworks run one after the other, each on all tokens. A token keeps the logits of its own modality and
    gives the weights of the others no gradient. Intermediate results are recomputed in the backward pass, so that
    memory holds those of one hypernetwork at a time.

    Args:
      modality_N: ids in [0, M), with M hypernetworks.
      gelu: applies a GELU to the code; equation (5) has none.
    """
    x_ND = x_ND.astype(jnp.float32)

    @jax.checkpoint
    def one(network: Hypernetworks) -> Array:
        return _logits_of_one(x_ND, network, phi_DC, gelu)

    def add(logits_NC: Array, numbered: tuple[Array, Hypernetworks]) -> tuple[Array, None]:
        modality, network = numbered
        return jnp.where((modality_N == modality)[:, None], one(network), logits_NC), None

    modalities = jnp.arange(hypernetworks.encode_MDZ.shape[0], dtype=jnp.int32)
    start_NC = jnp.zeros((x_ND.shape[0], phi_DC.shape[1]), jnp.float32)
    return jax.lax.scan(add, start_NC, (modalities, hypernetworks))[0]


def _logits_of_one(x_ND: Array, network: Hypernetworks, phi_DC: Array, gelu: bool) -> Array:
    def product(equation: str, *operands: Array) -> Array:
        return jnp.einsum(equation, *operands, precision=_EXACT)

    code_NZ = product("nd,dz->nz", x_ND, network.encode_MDZ) + network.encode_bias_MZ[None]
    if gelu:
        code_NZ = jax.nn.gelu(code_NZ)
    by_code_NZW = product("nd,zdw->nzw", x_ND, network.down_MZDW)
    low_NW = product("nz,nzw->nw", code_NZ, by_code_NZW) + product("nd,dw->nw", x_ND, network.down_bias_MDW)
    gate_NQ, up_NQ = jnp.split(low_NW, 2, axis=1)
    a_NQ = jax.nn.silu(gate_NQ) * up_NQ
    scored_ZQC = product("zqd,dc->zqc", network.up_MZQD, phi_DC)
    scored_bias_QC = product("qd,dc->qc", network.up_bias_MQD, phi_DC)
    both_NZQ = code_NZ[:, :, None] * a_NQ[:, None, :]
    return product("nzq,zqc->nc", both_NZQ, scored_ZQC) + product("nq,qc->nc", a_NQ, scored_bias_QC)


def _params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
    """Initial scales: codes, low-rank activations and E start at unit scale, the biases of the codes at zero (our
    reading).

    E is a product of four random maps and so has heavy tails. phi starts at a quarter of the usual scale, so that no
    token's softmax is saturated at the start.
    """
    M, Z, Q = config.router_modalities, config.router_hidden, config.router_rank
    hidden, embed, rank = ("router_hidden", Z), ("embed", d_model), ("router_rank", Q)
    gate_and_up = ("router_rank", 2 * Q)

    def weights(*dimensions: tuple[str, int], num_in: int) -> Param:
        names, sizes = zip(*dimensions, strict=True)
        init = FanIn(num_in=num_in, num_batch=1) if num_in else Constant(0.0)
        return Param((M, *sizes), ("modality", *names), init)

    return {
        "encode_MDZ": weights(embed, hidden, num_in=1),
        "encode_bias_MZ": weights(hidden, num_in=0),
        "down_MZDW": weights(hidden, embed, gate_and_up, num_in=2),
        "down_bias_MDW": weights(embed, gate_and_up, num_in=1),
        "up_MZQD": weights(hidden, rank, embed, num_in=2),
        "up_bias_MQD": weights(rank, embed, num_in=1),
        "phi": Param((d_model, columns), ("embed", "router"), FanIn(scale=0.25)),
    }


def _logits(
    config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "N C"]:
    assert modality_N is not None  # the caller checks `needs_modality`
    hypernetworks = Hypernetworks(**{field.name: params[field.name] for field in dataclasses.fields(Hypernetworks)})
    return dtr_logits(x_ND, modality_N, hypernetworks, params["phi"], gelu=config.router_gelu)


DTR = Router(_params, _logits, needs_modality=True)
DTR_SHARED = with_shared(DTR)
