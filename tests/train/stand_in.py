"""The smallest runs: a text-only model of one layer, and a linear stand-in for it that compiles quickly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.batch import Batch, make_batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import AttentionConfig, StackConfig
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.train.config import RunConfig, TrainConfig
from anyexperts_jax.train.optim import OptimConfig

LENGTH = 96
MODEL = ModelConfig(
    max_length=LENGTH,
    stack=StackConfig(
        d_model=16,
        num_layers=1,
        num_dense_layers=0,
        d_ff=16,
        expert_d_ff=8,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8),
        execution=Execution(dispatch="dense"),
    ),
    moe=AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=2, k_max=4),
    vision=None,
    audio=None,
)
DATA = DataConfig(domains=("nlp",), encoding=EncodingSpec(max_length=LENGTH, max_patches=0, max_frames=0))


def run_config(model=MODEL, data=DATA, seed=0, mesh=None, optim=None, **train) -> RunConfig:
    """A run of MODEL on short arithmetic questions; keywords are fields of TrainConfig."""
    fields = {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 3, "eval_every": 3, "eval_examples": 8}
    config = {"model": model, "data": data, "train": TrainConfig(**{**fields, **train}), "seed": seed}
    if mesh is not None:
        config["mesh"] = mesh
    return RunConfig(optim=optim or OptimConfig(lr=0.01, warmup_steps=2), **config)


def linear_params(seed=0):
    rng = np.random.default_rng(seed)
    return {"table": jnp.asarray(rng.normal(size=(260, 260)) * 0.1, jnp.float32)}


def linear_apply(params, batch, router_bias_LC, key, window):
    """A bigram model in the shape of `step.Apply`, with a made-up trace of one layer whose losses depend on params."""
    leaves = jax.tree.leaves(params)
    table = next(leaf for leaf in leaves if leaf.shape[0] == 260 and leaf.ndim == 2)
    logits = table[jnp.asarray(batch.tokens_BT)]
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 260 - logits.shape[-1])))
    if key is not None:
        logits = logits + jax.random.uniform(key, logits.shape[-1:])[None, None]
    valid = jnp.asarray(batch.valid_BT)[None]
    slots = jnp.where(valid, 4, 0)
    per_token = jnp.square(logits).mean(-1)[None] * valid.astype(jnp.float32)
    mean = per_token.sum((1, 2)) / jnp.maximum(valid.sum((1, 2), dtype=jnp.float32), 1)
    metrics = {"load_C": jnp.asarray([[4.0, 3, 2, 1, 0]]), "router_entropy": jnp.ones(1), "dropped": jnp.zeros(1)}
    trace = RoutingTrace(
        importance_BT=jnp.where(valid, 0.5, 0.0),
        slots_BT=slots,
        real_slots_BT=slots * 3 // 4,
        virtual_slots_BT=slots // 4,
        expert_ids_BTK=jnp.zeros((*slots.shape, 4), jnp.int32),
        losses={"balance": mean, "importance": 2 * mean, "z": 3 * mean},
        metrics=metrics,
    )
    return logits, trace


def random_batch(rows=8, length=12, seed=0) -> Batch:
    """Sequences of several modalities with answers of different lengths."""
    rng = np.random.default_rng(seed)
    positions = np.arange(length)
    lengths = rng.integers(length - 4, length + 1, rows)[:, None]
    answers = rng.integers(1, 4, rows)[:, None]
    return make_batch(
        rng.integers(0, 256, (rows, length)).astype(np.int32),
        modality_BT=np.where((positions > 0) & (positions < 4), np.arange(rows)[:, None] % 4, 0).astype(np.int32),
        valid_BT=positions < lengths,
        loss_mask_BT=(positions < lengths - 1) & (positions >= lengths - 1 - answers),
        patches_BPX=np.zeros((rows, 0, 192), np.float32),
        frames_BSX=np.zeros((rows, 0, 160), np.float32),
        level_B=np.ones(rows, np.int32),
        example_B=np.arange(rows, dtype=np.int32),
    )


def text_batch(rows=2) -> Batch:
    """Like `random_batch`, for a model without encoders."""
    batch = random_batch(rows=rows)
    return dataclasses.replace(
        batch,
        patches_BPX=batch.patches_BPX[:, :0, :0],
        frames_BSX=batch.frames_BSX[:, :0, :0],
        modality_BT=batch.time_BT,
    )
