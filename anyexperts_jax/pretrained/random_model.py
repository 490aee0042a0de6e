"""Makes a model with random weights from a published config.json, for tests, benchmarks and trials without download."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from anyexperts_jax.models.init import init_params
from anyexperts_jax.pretrained.family import family_of
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.model import Pretrained


def random_model(values: Mapping[str, Any], seed: int = 0) -> Pretrained:
    """Returns the model that a config.json describes, in float32, initialised by `models.init`.

    Args:
      values: the contents of config.json.

    Raises:
      UserError: if the configuration is not supported.
    """
    hub = HubConfig(values, "config.json")
    name, family = family_of(hub)
    config = family.config(hub)
    biased = config.moe.expert_bias and config.stack.num_moe_layers > 0
    bias_LC = jnp.zeros(config.router_bias_shape, jnp.float32) if biased else None
    params = init_params(config, jax.random.key(seed))
    return Pretrained(config, params, bias_LC, hub, family=name, path=pathlib.Path(), generation={})
