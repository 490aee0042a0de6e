"""How a network that was cut into experts routes before it has variable slots: every token gets every expert."""

from anyexperts_jax.core.config import AnyExpertsConfig

ROUTER = "markers"


def split_policy(num_experts: int, markers: int) -> AnyExpertsConfig:
    """Returns the policy of `split`: all experts for every token, each with weight 1.

    Args:
      num_experts: without the shared ones.
      markers: how many neurons of an expert the router uses to estimate its output.
    """
    return AnyExpertsConfig.static_top_k(
        num_experts, num_experts, router=ROUTER, router_markers=markers, normalisation="one"
    )
