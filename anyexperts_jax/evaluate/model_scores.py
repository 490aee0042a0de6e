"""Further scores of tokens that a trained model gives, as baselines for the AUC of importance."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy import ndarray

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.evaluate.measure import Batches, RoutingSample, Window, window_array
from anyexperts_jax.evaluate.trained import Trained, at_window
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.losses import answer_scores


def model_scores(
    trained: Trained, model: ModelConfig, sample: RoutingSample, batches: Batches, window: Window
) -> dict[str, Float[ndarray, "B T"]]:
    """Returns scores of every token in the batches of `sample`, by name.

    router entropy: in nats, mean over layers. gradient norm: norm of the gradient of the answers' loss by the embedded
    token, which requires knowing the answer. embedding norm: norm of the embedded token.
    """
    every = [batch for of_domain in batches.values() for batch in of_domain]
    arguments = (at_window(model, window), trained.placement, trained.params, trained.router_bias_LC)
    norms = [jax.device_get(input_norms(*arguments, trained.place(batch), window_array(window))) for batch in every]
    return {
        "router entropy": sample.entropy_LBT.astype(np.float64).mean(axis=0),
        "gradient norm": np.concatenate([gradient_BT for gradient_BT, _ in norms]),
        "embedding norm": np.concatenate([embedding_BT for _, embedding_BT in norms]),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def input_norms(
    config: ModelConfig, placement: Placement, params: Any, router_bias_LC: Array, batch: Batch, window: Array
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the norms of the gradient of the summed answers' loss by each embedded token, and of the tokens."""
    module = MultimodalModel(config, placement)
    x_BTD = module.apply({"params": params}, batch, method="embed")

    def loss(x_BTD: Array) -> Array:
        output: Any = module.apply(
            {"params": params}, x_BTD, batch, router_bias_LC=router_bias_LC, window=window, method="decode"
        )
        return answer_scores(output.logits_BTY, batch.tokens_BT, batch.loss_mask_BT).loss_B.sum()

    return jnp.linalg.norm(jax.grad(loss)(x_BTD), axis=-1), jnp.linalg.norm(x_BTD, axis=-1)
