"""The smallest complete run: one MoE layer, text and pictures, and importance that differs between tokens."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evaluate.trained import Trained
from anyexperts_jax.models.config import ModelConfig, VisionConfig
from anyexperts_jax.models.init import abstract_params, logical_axes
from anyexperts_jax.nn.config import AttentionConfig, StackConfig
from anyexperts_jax.train.checkpoint import Checkpoints
from anyexperts_jax.train.config import RunConfig, TrainConfig
from anyexperts_jax.train.metrics import RoutingSums, routing_means
from anyexperts_jax.train.optim import OptimConfig, make_optimizer
from anyexperts_jax.train.run_dir import RunDir, open_run_dir
from anyexperts_jax.train.run_log import RunLog
from anyexperts_jax.train.state import init_state

MODEL = ModelConfig(
    stack=StackConfig(
        d_model=16,
        num_layers=2,
        num_dense_layers=0,
        d_ff=16,
        expert_d_ff=8,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8),
        execution=Execution(dispatch="dense"),
    ),
    moe=AnyExpertsConfig(num_experts=8, num_virtual=2, k_min=3, k_max=6, cap_rounding="floor"),
    vision=VisionConfig(),
    audio=None,
)
DATA = DataConfig(domains=("general", "nlp"), encoding=EncodingSpec(max_frames=0), threads=0)
TRAIN = TrainConfig(steps=4)
OPTIM = OptimConfig(warmup_steps=1)


def config_of(model: ModelConfig) -> RunConfig:
    return RunConfig(model=model, data=DATA, train=TRAIN, optim=OPTIM)


def trained(model: ModelConfig = MODEL, seed: int = 0, config: RunConfig | None = None) -> Trained:
    """Returns a model with random parameters, even in the importance network's last layer, which starts at 0."""
    rng = np.random.default_rng(seed)

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        width = shape.shape[-2] if len(shape.shape) > 1 else 1  # a norm's scale, [L, D] in the scan, is random as well
        return jnp.asarray(rng.normal(size=shape.shape) * 1.5 / np.sqrt(width), shape.dtype)

    params = jax.tree.map(fill, abstract_params(model))
    bias_LC = jnp.zeros((model.stack.num_moe_layers, model.moe.num_columns), jnp.float32)
    return Trained(config or config_of(model), params, bias_LC, step=4)


def write_run(root: pathlib.Path, one: Trained) -> pathlib.Path:
    """Writes a run directory with configuration, records and a checkpoint."""
    paths, _ = open_run_dir(root, one.config)
    write_records(paths)
    optimizer = make_optimizer(one.config.optim, logical_axes(one.config.model))
    state = dataclasses.replace(init_state(one.config.model, optimizer, one.params), step=jnp.int32(one.step))
    checkpoints = Checkpoints(paths.checkpoints)
    checkpoints.save(state, {}, one.config, validation_loss=1.0)
    checkpoints.wait()
    checkpoints.close()
    return root


def write_records(paths: RunDir, steps: int = 4) -> None:
    """Writes records like the training loop's, with video in the first step only."""
    log = RunLog(paths, 0)
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        tokens_M = np.array([40.0, 30.0, 0.0, 5.0 if step == 1 else 0.0])
        shares_LM = rng.uniform(0.3, 0.7, (MODEL.stack.num_moe_layers, 4))
        sums = {
            "tokens_M": tokens_M,
            "importance_LM": shares_LM * tokens_M,
            "real_slots_LM": (3 + shares_LM) * tokens_M,
            "virtual_slots_LM": shares_LM * tokens_M,
            "histogram": np.zeros((*shares_LM.shape, 20)),
            "load_LC": rng.integers(1, 9, (2, MODEL.moe.num_columns)),
            "entropy_L": np.ones(2),
            "dropped_L": np.zeros(2),
        }
        routing = routing_means(MODEL.moe, RoutingSums(**{k: jnp.asarray(v, "float32") for k, v in sums.items()}))
        losses = {"loss": 3.0 / step, "answer_loss": 2.0 / step, "balance_loss": 1 + 0.2 / step}
        losses |= {"importance_loss": 0.0, "z_loss": 9.0 + step % 3}  # the importance loss starts at 0
        log.write("train", step, {**losses, **routing})
    domains = {name: {"loss": 0.5, "token_accuracy": 0.5, "exact_match": 0.25, "examples": 8} for name in DATA.domains}
    log.write("validation", steps, {"loss": 0.5, "domains": domains, **routing})
    log.close()
