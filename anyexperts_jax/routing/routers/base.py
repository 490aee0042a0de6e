"""`Router`: the parameters that a router declares and the logits it computes from them."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.initializers import Constant, FanIn, Param
from anyexperts_jax.ops.contraction import Contraction, contract

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Router:
    """An entry of `core.registries.ROUTERS`. Everything is float32, whatever the model's dtype.

    params: (config, D, columns) -> the declaration of each parameter, by name.
    logits: (config, parameters, x_ND, modality_N) -> logits [N, columns], float32. `modality_N` may be None, but only
      if `needs_modality` is False.
    needs_modality: whether the logits depend on the tokens' modality ids, in [0, config.router_modalities).
    """

    params: Callable[[AnyExpertsConfig, int, int], dict[str, Param]]
    logits: Callable[[AnyExpertsConfig, Params, Float[Array, "N D"], Int[Array, "N"] | None], Float[Array, "N C"]]
    needs_modality: bool = False


def linear_params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
    """One map for all tokens."""
    del config
    return {"kernel": Param((d_model, columns), ("embed", "router"), FanIn())}


def linear_logits(
    config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "N C"]:
    """x times the kernel, in float32 at full precision."""
    del config, modality_N
    return contract(x_ND, params["kernel"], Contraction(precision=jax.lax.Precision.HIGHEST))


def with_shared(own: Router) -> Router:
    """Mixes a router with one linear map for all tokens: (1 - a) own + a shared, where a = sigmoid(mix) per layer.

    EvoMoE compares "with a weighted shared router" without giving the weighting (our reading).
    """

    def params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
        shared = linear_params(config, d_model, columns)
        return {**own.params(config, d_model, columns), "mix": Param((), (), Constant(0.0)), **shared}

    def logits(
        config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
    ) -> Float[Array, "N C"]:
        own_NC = own.logits(config, params, x_ND, modality_N)
        shared_NC = linear_logits(config, params, x_ND, modality_N)
        return mixed_logits(own_NC, shared_NC, params["mix"])

    return Router(params, logits, own.needs_modality)


def mixed_logits(
    own_NC: Float[Array, "N C"], shared_NC: Float[Array, "N C"], mix: Float[Array, ""]
) -> Float[Array, "N C"]:
    """(1 - a) own + a shared with a = sigmoid(mix)."""
    share = jax.nn.sigmoid(mix)
    return (1 - share) * own_NC + share * shared_NC
