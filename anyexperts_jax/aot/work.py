"""Counts the work of a train step from its configuration: the FLOPs of its matmuls, next to which all other
operations are small, and the bytes it must move.
"""

import dataclasses
import math

import jax

from anyexperts_jax.core.hardware import tpu_limits
from anyexperts_jax.dispatch.capacity import rows_per_expert
from anyexperts_jax.dispatch.exchange_sizes import buffer_sizes
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, logical_axes, named_leaves
from anyexperts_jax.models.paths import is_a, is_matmul, tower_of
from anyexperts_jax.ops.attention import splash
from anyexperts_jax.ops.expert_mlp.tpu_sizes import Shape
from anyexperts_jax.ops.routed_mlp.tpu import aligned_sizes
from anyexperts_jax.routing.plan import plan_spec
from anyexperts_jax.sharding.rules import as_tuple
from anyexperts_jax.sharding.specs import DEFAULT_RULES, token_shards
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.trainable import what_trains

_FORWARD_AND_BACKWARD = 3  # a matmul has two gradients, each with as many FLOPs
_SPLASH = (2 + 7, 2 + 4)  # matmuls over all scores: those that splash attention computes, and those that are needed
_XLA_TILE = 128  # rows; an assumption, as XLA does not tell


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one step, over all devices."""

    real_flops: dict[str, float]  # "experts", "attention" (scores and their use), "dense" (every other matmul)
    extra_flops: dict[str, float]  # "expert padding", "masked attention", "computed again"
    rows_real: int  # expert rows at the configured budget, all layers
    rows_computed: int  # with the padding of each expert's last tile
    rows_buffers: int  # expert rows that the buffers have room for
    rows_sent: int  # rows that travel to the experts' devices, and as many back; 0 unless dispatch="exchange"
    hbm_bytes: float  # least bytes that a device must read and write, without the state

    @property
    def flops(self) -> float:
        return sum(self.real_flops.values()) + sum(self.extra_flops.values())


def count_work(config: RunConfig, mesh: dict[str, int], device_kind: str = "") -> Work:
    """Counts the work of a step on a mesh of these sizes, at the nominal budget and without padding.

    Args:
      device_kind: the TPU, as JAX names it, whose tiles the expert kernels use; "" assumes tiles of 128 rows.
    """
    model = config.model
    stack, moe = model.stack, model.moe
    tokens = config.train.batch_size * config.data.encoding.max_length
    layers = stack.num_moe_layers
    rows = round(moe.expected_real_slots * tokens * layers)
    passes = _passes(config)
    row_flops = 6 * stack.d_model * stack.expert_d_ff
    shared, blocks, blocks_forward = _dense_flops(config, tokens, passes)
    pairs = tokens * (config.data.encoding.max_length + 1) / 2  # pairs of a query and a key it attends to
    attention = stack.attention
    widths = attention.num_heads * (attention.head_dim + attention.value_dim)
    scores = _FORWARD_AND_BACKWARD * 2 * pairs * widths * stack.num_layers
    one_width = attention.value_dim == attention.head_dim
    fits = one_width and splash.supports(config.data.encoding.max_length, attention.head_dim)
    skips = fits and device_kind.startswith("TPU") and mesh["sequence"] == 1
    computed, buffers, sent = _rows(config, mesh, device_kind, rows)
    again = 0.0 if stack.remat == "none" else 1.0
    masked = scores * (_SPLASH[0] / _SPLASH[1] - 1) if skips else scores
    dense_again = 0.0 if stack.remat == "dots" else again * blocks_forward
    own = [count for name, count in passes.items() if is_a("expert", name)]
    of_experts = sum(own) / max(len(own), 1)  # matrices of one size
    return Work(
        real_flops={"experts": of_experts * rows * row_flops, "attention": scores, "dense": shared + blocks},
        extra_flops={
            "expert padding": of_experts * (computed - rows) * row_flops,
            "masked attention": masked,
            "computed again": again * (computed * row_flops + scores / _FORWARD_AND_BACKWARD) + dense_again,
        },
        rows_real=rows,
        rows_computed=computed,
        rows_buffers=buffers,
        rows_sent=sent,
        hbm_bytes=_least_bytes(config, mesh),
    )


def _passes(config: RunConfig) -> dict[str, int]:
    """Returns how often a step computes each parameter's matmul; a frozen one has no gradient but passes one on."""
    trainable = what_trains(config).trainable
    names = named_leaves(abstract_params(config.model))
    if trainable is None:
        return dict.fromkeys(names, _FORWARD_AND_BACKWARD)
    trained = named_leaves(trainable)
    return {name: _FORWARD_AND_BACKWARD if trained[name] else _FORWARD_AND_BACKWARD - 1 for name in names}


def _dense_flops(config: RunConfig, tokens: int, passes: dict[str, int]) -> tuple[float, float, float]:
    """Counts FLOPs of all but the routed experts' matmuls: (outside the stack, inside, the latter's forward pass)."""
    encoding, outside, inside, forward = config.data.encoding, 0.0, 0.0, 0.0
    batch = config.train.batch_size
    rows_of = {"vision": batch * encoding.max_patches, "audio": batch * encoding.max_frames}
    for name, array in named_leaves(abstract_params(config.model)).items():
        if not is_matmul(name):
            continue
        tower = tower_of(name)
        flops = 2.0 * rows_of.get(tower, tokens) * math.prod(array.shape)
        if tower == "decoder":
            inside += passes[name] * flops
            forward += flops
        else:
            outside += passes[name] * flops
    if config.model.tie_embeddings:
        outside += _FORWARD_AND_BACKWARD * 2.0 * tokens * config.model.vocab_size * config.model.stack.d_model
    return outside, inside, forward


def _rows(config: RunConfig, mesh: dict[str, int], device_kind: str, rows: int) -> tuple[int, int, int]:
    """Counts (expert rows that kernels compute, rows that buffers hold, rows sent) over all layers and devices."""
    stack, moe = config.model.stack, config.model.moe
    shards = token_shards(mesh)
    tokens = config.train.batch_size * config.data.encoding.max_length // (shards * config.train.accumulation)
    spec, execution = plan_spec(moe), stack.execution
    parts = mesh["expert"] if execution.dispatch == "exchange" else 1
    times, sent = shards * config.train.accumulation * stack.num_moe_layers, 0
    if execution.dispatch == "exchange":
        tokens, times = tokens // execution.exchange_chunks, times * execution.exchange_chunks
        sizes = buffer_sizes(spec, execution.capacity_factor, tokens, parts, moe.slots_bound)
        held, sent = parts * sizes.slots, parts * sizes.rows
    elif execution.dispatch == "capacity":
        held = moe.num_experts * rows_per_expert(spec, execution.capacity_factor, tokens)
    else:
        held = math.ceil(moe.expected_real_slots * tokens)
    if execution.dispatch == "dense":
        held = moe.num_experts * tokens
    experts = moe.num_experts // parts
    tile = _XLA_TILE
    if device_kind.startswith("TPU"):
        shape = Shape(math.ceil(held / experts), stack.d_model, stack.expert_d_ff, 2)
        tile = aligned_sizes(tpu_limits(device_kind), shape).forward.step
    # An expert's last tile is half empty on average; tiles without live rows are skipped.
    computed = times * held if execution.dispatch == "dense" else rows + times * experts * tile // 2
    return computed, times * held, times * sent


def _least_bytes(config: RunConfig, mesh: dict[str, int]) -> float:
    """Returns the least bytes moved: gathered weights in the compute dtype, read in each pass, and the logits and
    their gradient, written and read."""
    passes = 2 if config.model.stack.remat == "none" else 3
    weights = gathered_bytes(config.model, mesh)
    positions = config.train.batch_size * config.data.encoding.max_length / token_shards(mesh)
    logits = 4 * positions * config.model.vocab_size / mesh["tensor"]
    return passes * config.train.accumulation * weights + 4 * logits


def gathered_bytes(model: ModelConfig, mesh: dict[str, int]) -> float:
    """Returns the bytes of a device's weights in the compute dtype, after gathering those split over `fsdp`.

    With dispatch="blocks" a device needs all experts, so those split over `expert` are gathered too.
    """
    gathered = {"embed", "expert"} if model.stack.execution.dispatch == "blocks" else {"embed"}
    itemsize = 2 if model.stack.dtype == "bfloat16" else 4
    weights = 0.0
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    for array, names in zip(jax.tree.leaves(abstract_params(model)), axes, strict=True):
        kept = [axis for name in names if name not in gathered for axis in as_tuple(getattr(DEFAULT_RULES, name))]
        weights += math.prod(array.shape) / math.prod(mesh[axis] for axis in kept) * itemsize
    return weights
