"""Named models, and the dense and static top-k twins of any model."""

import dataclasses
from collections.abc import Callable

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require_one_of
from anyexperts_jax.core.switches import Switches
from anyexperts_jax.models.config import AudioConfig, ModelConfig, VisionConfig
from anyexperts_jax.nn.config import AttentionConfig, StackConfig


def _tiny() -> ModelConfig:
    """About 0.6M parameters: learns the five domains in minutes on two CPU cores."""
    return ModelConfig(
        stack=StackConfig(
            d_model=64,
            num_layers=3,
            d_ff=192,
            expert_d_ff=32,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        ),
        moe=AnyExpertsConfig(num_experts=32, num_virtual=8, switches=Switches(cap_rounding="floor")),
        vision=VisionConfig(d_ff=128),
        audio=AudioConfig(d_ff=128),
    )


def _small() -> ModelConfig:
    """About 400M parameters: hours on one accelerator."""
    return ModelConfig(
        max_length=512,
        stack=StackConfig(
            d_model=768,
            num_layers=10,
            d_ff=2304,
            expert_d_ff=256,
            attention=AttentionConfig(num_heads=12, num_kv_heads=4, head_dim=64, qk_norm=True),
            remat="routing",
            dtype="bfloat16",
        ),
        moe=AnyExpertsConfig(num_experts=64, num_virtual=16, switches=Switches(cap_rounding="floor")),
        vision=VisionConfig(num_layers=2, d_ff=1536),
        audio=AudioConfig(num_layers=2, d_ff=1536),
    )


def _ling_mini_2() -> ModelConfig:
    """The paper's base, Ling-mini-2.0 (16B), with AnyExperts' window of 8 to 12 slots and 64 virtual experts.

    The language model is Ling-mini-2.0's, except that padding and the end of a sequence have the ids of the tokenizer
    here. The paper does not describe the modality encoders; these map patches and frames linearly.
    """
    return ModelConfig(
        vocab_size=157_184,
        max_length=32_768,
        stack=StackConfig(
            d_model=2048,
            num_layers=20,
            d_ff=5120,
            expert_d_ff=512,
            attention=AttentionConfig(
                num_heads=16, num_kv_heads=4, head_dim=128, rope_theta=600_000.0, rope_fraction=0.5, qk_norm=True
            ),
            remat="full",
            dtype="bfloat16",
        ),
        moe=AnyExpertsConfig(
            scores="sigmoid",
            scaling_factor=2.5,
            num_groups=8,
            groups_kept=4,
            expert_bias=True,
            switches=Switches(selection="scores"),
        ),
        vision=VisionConfig(patch_features=14 * 14 * 3, max_frames=128, d_ff=5120),
        audio=AudioConfig(frame_features=80 * 4, d_ff=5120),
    )


def _tiny_dense() -> ModelConfig:
    """`tiny` with four dense layers and no experts: the model from which EvoMoE's experts evolve."""
    tiny = _tiny()
    return dense_twin(dataclasses.replace(tiny, stack=dataclasses.replace(tiny.stack, num_layers=4)))


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": _tiny,
    "tiny_dense": _tiny_dense,
    "small": _small,
    "ling_mini_2": _ling_mini_2,
}


def model_preset(name: str) -> ModelConfig:
    """The model preset of that name.

    Raises:
      UserError: for an unknown name.
    """
    require_one_of("model preset", name, PRESETS)
    return PRESETS[name]()


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The same model with a dense FFN of width `d_ff` in every layer, without routers and experts."""
    stack = dataclasses.replace(
        config.stack, num_dense_layers=config.stack.num_layers, moe_every=1, num_shared_experts=0, scan_unroll=1
    )
    return dataclasses.replace(config, stack=stack, moe=AnyExpertsConfig.static_top_k(1, 1))


def static_twin(config: ModelConfig, k: int) -> ModelConfig:
    """The same model with static top-k routing: k real experts for every token, no virtual ones, no importance.

    It lacks the router's virtual columns and the importance network; all other parameters have the same shapes.

    Raises:
      UserError: if k is below 1 or exceeds the number of experts in reach.
    """
    moe = config.moe.with_switches(slot_rounding="round", slot_gradient="none", hsm_site="off", iar="off")
    moe = dataclasses.replace(moe, num_virtual=0, k_min=k, k_max=k, rho_max=0.0, importance_weight=0.0)
    return dataclasses.replace(config, moe=moe)
