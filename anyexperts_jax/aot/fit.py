"""Checks that a step fits into a device's memory, and suggests what helps most if it does not."""

import dataclasses
import re
from collections.abc import Mapping

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.quantities import bytes_text
from anyexperts_jax.dispatch.exchange_sizes import expected_devices
from anyexperts_jax.routing.plan import plan_spec
from anyexperts_jax.sharding.specs import token_shards
from anyexperts_jax.train.config import RunConfig

_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMG])\)? exceeds available HBM|Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Knob:
    """A change of the configuration, and an estimate of the bytes it saves per device."""

    change: str
    saves: float


def temporaries_refused(message: str) -> float | None:
    """The bytes of temporaries in the compiler's out-of-memory message; None for any other error."""
    found = _OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    return float(found[1] or found[3]) * _UNITS[found[2] or found[4]]


def require_fits(config: RunConfig, topology: str, mesh: dict[str, int], memory: Mapping[str, int], hbm: int) -> None:
    """Raises `UserError` if a compiled step needs more memory than a device has."""
    if sum(memory.values()) > hbm:
        state = memory["state and batch"]
        raise does_not_fit(config, mesh, topology, hbm=hbm, state=state, temporaries=sum(memory.values()) - state)


def does_not_fit(
    config: RunConfig, mesh: dict[str, int], topology: str, hbm: float, state: float, temporaries: float
) -> UserError:
    """The error with the excess and the two changes that help most."""
    best = [f"{knob.change} (about {bytes_text(knob.saves)} less)" for knob in knobs(config, mesh, state, temporaries)]
    over = state + temporaries - hbm
    return UserError(
        f"the step does not fit a device of {topology}: {bytes_text(over, 2)} more than its {bytes_text(hbm, 0)} "
        f"(state {bytes_text(state, 2)}, temporaries {bytes_text(temporaries, 2)}); what helps most: "
        f"{' or '.join(best[:2])}"
    )


def knobs(config: RunConfig, mesh: dict[str, int], state: float, temporaries: float) -> list[Knob]:
    """The changes that save memory, the largest first. The state shrinks with the number of devices it is split over,
    temporaries with the sequences that a device computes at a time and with what is kept for the backward pass."""
    train, stack, length = config.train, config.model.stack, config.data.encoding.max_length
    kept = kept_bytes(config, mesh, stack.remat)
    found = []
    if mesh["data"] % 2 == 0:
        sizes = f"mesh.fsdp={2 * mesh['fsdp']} with mesh.data={mesh['data'] // 2}"
        found.append(Knob(sizes, state / 2))
    else:
        found.append(
            Knob("twice the devices along mesh.fsdp", state / 2 + (temporaries / 2 if _divides(config, mesh) else 0))
        )
    if stack.param_dtype == "float32":
        # Of a parameter and its two moments, which stay float32, the parameter alone takes half.
        found.append(Knob('model.stack.param_dtype="bfloat16"', state / 6))
    if stack.remat != "full":
        found.append(Knob('model.stack.remat="full"', kept - kept_bytes(config, mesh, "full")))
    if _divides(config, mesh):
        found.append(Knob(f"train.accumulation={2 * train.accumulation}", temporaries / 2))
    else:
        found.append(Knob(f"data.encoding.max_length={length // 2}", temporaries / 2))
    return sorted(found, key=lambda knob: -knob.saves)


def _divides(config: RunConfig, mesh: dict[str, int]) -> bool:
    shards = token_shards(mesh) // mesh["sequence"]
    return config.train.batch_size % (2 * shards * config.train.accumulation) == 0


def kept_bytes(config: RunConfig, mesh: dict[str, int], remat: str) -> float:
    """An estimate of the bytes that a device keeps for the backward pass, over all layers, under a remat policy."""
    stack, moe, attention = config.model.stack, config.model.moe, config.model.stack.attention
    itemsize = 2 if stack.dtype == "bfloat16" else 4
    slots, sent = stack.execution.capacity_factor * moe.expected_real_slots, 0.0
    if stack.execution.dispatch == "exchange":
        sent = stack.execution.capacity_factor * expected_devices(plan_spec(moe), mesh["expert"])
    shared = 3 * stack.num_shared_experts * stack.expert_d_ff
    router = 4 * moe.num_columns
    per_token = {
        "full": stack.d_model * itemsize,
        "routing": stack.d_model * itemsize + router,
        "exchanged": stack.d_model * itemsize * (1 + sent) + 2 * 4 * moe.slots_bound * sent + router,
        "dots": (2 * stack.d_model + attention.projected_dims + shared) * itemsize + router,
    }
    per_token["none"] = (
        per_token["dots"]
        + itemsize * (2 * stack.d_model * (sent or slots) + 2 * stack.expert_d_ff * slots)
        + (4 * attention.num_heads * config.data.encoding.max_length)
    )
    tokens = (
        config.train.batch_size * config.data.encoding.max_length / (token_shards(mesh) * config.train.accumulation)
    )
    return tokens * stack.num_layers * per_token[remat]
