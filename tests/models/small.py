"""The smallest model that has every part, with random parameters, and batches that hold every modality."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.batch import Batch, make_batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.config import AudioConfig, ModelConfig, VisionConfig
from anyexperts_jax.models.init import abstract_params
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.nn.config import AttentionConfig, StackConfig

SMALL = ModelConfig(
    vocab_size=40,
    max_length=24,
    pad_id=36,
    eos_id=39,
    stack=StackConfig(
        d_model=16,
        num_layers=3,
        d_ff=24,
        expert_d_ff=12,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        execution=Execution(dispatch="dense"),
    ),
    moe=AnyExpertsConfig(num_experts=6, num_virtual=2, k_min=2, k_max=5, rho_max=0.25, alpha=0.1),
    vision=VisionConfig(patch_features=12, place_frequencies=3, max_frames=4, d_ff=20),
    audio=AudioConfig(frame_features=10, d_ff=20),
)


def small(moe=None, stack=None, **fields) -> ModelConfig:
    """SMALL with some fields replaced."""
    config = dataclasses.replace(SMALL, **fields)
    return dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, **(moe or {})),
        stack=dataclasses.replace(config.stack, **(stack or {})),
    )


def random_params(config, seed=0):
    """Parameters with no zeros among them: a zero initialisation hides what it multiplies."""
    rng = np.random.default_rng(seed)

    def draw(path, p):
        scale = 0.3 if len(p.shape) < 2 else p.shape[-2] ** -0.5
        values = rng.normal(size=p.shape) * scale + (1.0 if "scale" in str(path[-1]) else 0.0)
        return jnp.asarray(np.asarray(values, p.dtype))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def random_batch(config=SMALL, lengths=(20, 14, 7), total=22, seed=1) -> Batch:
    """Sequences of text, image, audio and video positions, right-padded to `total`."""
    rng = np.random.default_rng(seed)
    B, T = len(lengths), total
    modality_BT = np.zeros((B, T), np.int32)
    time_BT = np.zeros((B, T), np.int32)
    modality_BT[:, 1:4], modality_BT[:, 4:6] = 1, 2
    modality_BT[0, 6:10], time_BT[0, 6:10] = 3, [0, 0, 1, 1]
    modality_BT[1, 1:6] = 0
    valid_BT = np.arange(T) < np.asarray(lengths)[:, None]
    tokens_BT = rng.integers(0, 36, (B, 24))[:, :T]  # the same tokens whatever the padding
    return make_batch(
        np.where((modality_BT == 0) & valid_BT, tokens_BT, config.pad_id).astype(np.int32),
        modality_BT=np.where(valid_BT, modality_BT, 0).astype(np.int32),
        valid_BT=valid_BT,
        loss_mask_BT=valid_BT & (np.arange(T) >= 5),
        time_BT=time_BT,
        patches_BPX=rng.normal(size=(B, 8, 12)).astype(np.float32),
        patch_row_BP=(np.arange(8, dtype=np.int32) // 3)[None].repeat(B, 0),
        patch_column_BP=(np.arange(8, dtype=np.int32) % 3)[None].repeat(B, 0),
        patch_item_BP=np.where(np.arange(8) < 3, 0, 2)[None].repeat(B, 0).astype(np.int32),  # an image, a video
        frames_BSX=rng.normal(size=(B, 3, 10)).astype(np.float32),
        frame_item_BS=np.ones((B, 3), np.int32),
        level_B=np.ones(B, np.int32),
        example_B=np.arange(B, dtype=np.int32),
    )


# A test runs a compiled model a few times at most, so fast compilation matters more than fast execution.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@functools.cache
def forward(config):
    """The jitted model: (params, batch, router_bias_LC, window) -> ModelOutput. One compilation per configuration."""
    model = MultimodalModel(config)

    def apply(params, batch, bias=None, window=None):
        return model.apply({"params": params}, batch, router_bias_LC=bias, window=window)

    return jax.jit(apply, compiler_options=FAST_COMPILE)


@functools.cache
def loss_and_grad(config):
    """The jitted loss with its gradient: (params, batch, weights) -> (loss, ModelOutput), grads.

    `weights` are those of the answer's cross entropy and of the router losses, by name.
    """
    model = MultimodalModel(config)

    def loss(params, batch, weights):
        output = model.apply({"params": params}, batch)
        log_probs = jax.nn.log_softmax(output.logits_BTY)[:, :-1]
        nats = -jnp.take_along_axis(log_probs, batch.tokens_BT[:, 1:, None], axis=-1)[..., 0]
        mask = batch.loss_mask_BT[:, :-1]
        losses = {"answer": jnp.where(mask, nats, 0).sum() / mask.sum().astype(jnp.float32)}
        losses |= {name: value.mean() for name, value in output.trace.losses.items()}
        return sum(weight * losses[name] for name, weight in weights.items()), output

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)


def weights(answer=1.0, balance=1.0, importance=0.1):
    return {"answer": answer, "balance": balance, "importance": importance}
