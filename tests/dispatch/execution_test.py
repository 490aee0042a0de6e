import dataclasses

import jax
import jax.numpy as jnp
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution, require_capacity_for, resolve_implementation
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement, one_device


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dispatch": "sparse"}, "dispatch='sparse' is unknown; valid: auto, blocks, capacity, dense, exchange"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown; valid: reference, xla, pallas_tpu"),
        ({"residuals": "all"}, "residuals='all' is unknown; valid: saved, recomputed"),
        ({"overflow": "ignore"}, "overflow='ignore' is unknown; valid: drop, fallback"),
        ({"capacity_factor": 0}, "capacity_factor=0 must be > 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan must be a finite number"),
        ({"capacity_factor": True}, "capacity_factor=True must be a finite number"),
        ({"exchange_chunks": 0}, "exchange_chunks=0 must be >= 1"),
        ({"exchange_chunks": 1.0}, "exchange_chunks=1.0 must be a whole number"),
    ],
)
def test_a_wrong_value_is_refused_when_the_execution_is_made(fields, message):
    with pytest.raises(UserError) as error:
        Execution(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize("dispatch", ["capacity", "exchange"])
def test_buffers_must_hold_the_slots_that_every_token_gets(dispatch):
    # room for 0.7 * 8 = 5.6; at K = 8 at least 8 - 2 = 6 slots are real
    tight = Execution(dispatch=dispatch, capacity_factor=0.7)
    message = (
        "capacity_factor=0.7 gives room for 5.6 real slots per token, fewer than the 6 every token gets from k_min"
    )
    with pytest.raises(UserError, match=message):
        require_capacity_for(AnyExpertsConfig(), tight)
    require_capacity_for(AnyExpertsConfig(), dataclasses.replace(tight, capacity_factor=0.75))
    require_capacity_for(AnyExpertsConfig(), dataclasses.replace(tight, dispatch="blocks"))


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str


class PlacementOf(Placement):
    """A placement on devices that are not attached."""

    def __init__(self, device, count):
        object.__setattr__(self, "kind", device)
        object.__setattr__(self, "mesh", jax.sharding.AbstractMesh((count,), ("data",)))

    @property
    def device(self):
        return self.kind


@pytest.mark.parametrize("dispatch", ["blocks", "capacity", "dense", "exchange"])
@pytest.mark.parametrize("count", [1, 8])
def test_kernels_run_wherever_a_device_computes_its_own_part(dispatch, count):
    """On eight devices XLA partitions "capacity" and "dense", and it cannot partition a kernel."""
    tpu = PlacementOf(Device("tpu", "TPU v5e"), count)
    found = resolve_implementation(Execution(dispatch=dispatch), tpu, jnp.dtype("bfloat16"))
    left_to_xla = count > 1 and dispatch in ("capacity", "dense")
    assert found.implementation == ("xla" if left_to_xla else "pallas_tpu")


def test_the_implementation_follows_the_devices_of_the_mesh():
    gpu = PlacementOf(Device("gpu", "NVIDIA H100 80GB HBM3"), 8)
    assert resolve_implementation(Execution(), gpu, jnp.dtype("float32")).implementation == "pallas_triton"
    assert resolve_implementation(Execution(), gpu, jnp.dtype("float64")).implementation == "xla"
    for placement in (None, one_device(), Placement(make_mesh(MeshConfig()))):
        assert resolve_implementation(Execution(), placement, jnp.dtype("float32")).implementation == "xla"
    asked = Execution(implementation="reference")
    assert resolve_implementation(asked, gpu, jnp.dtype("float32")) is asked
