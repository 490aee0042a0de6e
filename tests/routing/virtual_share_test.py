"""The table of papers/anyexperts.md section 3: the virtual share of an untrained router under each reading of IAR."""

import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from routing.compiled import routed

TOKENS = 3000
# 256 + 64 columns of unit normal logits and, in effect, no cap: (w, K) = (.1, 8), (.5, 10), (.9, 12).
SETTINGS = ((0.1, 8), (0.5, 10), (0.9, 12))


@pytest.mark.parametrize(
    ("iar", "scores", "virtual_bias", "shares"),
    [
        ("off", "softmax", 0.0, (0.20, 0.20, 0.20)),
        ("multiply_logits", "softmax", 0.0, (0.083, 0.000, 0.000)),
        ("multiply_sigmoid", "sigmoid", 0.0, (0.000, 0.000, 0.000)),
        ("multiply_softmax", "softmax", 0.0, (0.136, 0.013, 0.000)),
        ("multiply_softmax", "softmax", np.log(3), (0.65, 0.20, 0.001)),
        ("add", "softmax", 0.0, (0.135, 0.018, 0.001)),
        ("add", "softmax", 1.0, (0.59, 0.20, 0.034)),
    ],
)
def test_virtual_share(iar, scores, virtual_bias, shares):
    config = AnyExpertsConfig(k_min=8, k_max=12, rho_max=0.999, iar=iar, scores=scores)
    for (w, K), share in zip(SETTINGS, shares, strict=True):
        logits = np.random.default_rng(K).normal(size=(TOKENS, 320)).astype(np.float32)
        logits[:, 256:] += virtual_bias
        z = np.full(TOKENS, np.log(w / (1 - w)), np.float32)
        plan = routed(config, logits, z, window=np.array([K, K], np.float32))
        # A slot is virtual with probability p <= 0.65: four standard deviations of the mean over TOKENS * K of them,
        # which are nearly independent, are at most 4 sqrt(0.23 / 24000) = 0.012; the table is rounded to 0.005.
        tolerance = 4 * np.sqrt(share * (1 - share) / (TOKENS * K)) + (0.005 if share in (0.20, 0.65, 0.59) else 0.001)
        assert float(plan.metrics["virtual_share"]) == pytest.approx(share, abs=tolerance)
