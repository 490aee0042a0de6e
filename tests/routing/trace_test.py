import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.route import route
from anyexperts_jax.routing.trace import RoutingTrace
from routing.compiled import routed

CONFIG = AnyExpertsConfig(num_experts=4, num_virtual=2, k_min=1, k_max=3)
LOGITS = jax.random.normal(jax.random.key(0), (6, 6))
Z = jnp.arange(6.0)


def test_a_trace_has_the_plans_arrays_in_the_shape_of_the_batch():
    plan = routed(CONFIG, LOGITS, Z)
    trace = RoutingTrace.from_plan(plan, 2, dropped=3)
    np.testing.assert_array_equal(trace.importance_BT, plan.importance_N.reshape(2, 3))
    np.testing.assert_array_equal(trace.real_slots_BT + trace.virtual_slots_BT, trace.slots_BT)
    assert trace.expert_ids_BTK[1, 0].tolist() == plan.expert_ids_NK[3].tolist()
    assert trace.losses.keys() == {"balance", "importance", "z"}
    assert float(trace.metrics["dropped"]) == 3.0
    assert trace.metrics["load_C"].shape == (6,)


def test_scan_stacks_traces_over_layers():
    def layer(shift, logits):
        return shift + 1, RoutingTrace.from_plan(route(CONFIG, logits, Z + shift), 2)

    _, trace = jax.lax.scan(layer, 0.0, jnp.stack([LOGITS, -LOGITS]))
    assert trace.slots_BT.shape == (2, 2, 3)
    assert trace.expert_ids_BTK.shape == (2, 2, 3, 3)
    assert trace.losses["balance"].shape == (2,)
    second = routed(CONFIG, -LOGITS, Z + 1)
    np.testing.assert_array_equal(trace.expert_ids_BTK[1].reshape(6, 3), second.expert_ids_NK)
