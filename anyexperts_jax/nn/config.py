"""The configuration of the decoder stack. `core.config.AnyExpertsConfig` holds the routing policy."""

import dataclasses
from typing import Literal, get_args

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.remat import Remat
from anyexperts_jax.dispatch.execution import Execution

Dtype = Literal["float32", "bfloat16"]
MOST_LAYERS = 1000  # per stack or encoder: some layers are traced one by one, and more would take days to compile


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model trained on short sequences stretches its rotary wavelengths for longer ones; see `nn.rope`.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    kind: Literal["linear", "llama3", "yarn"] = "linear"  # the rule that decides which wavelengths are stretched
    factor: float = 1.0  # by which stretched wavelengths grow
    original_length: int = 8192  # longest sequence before the stretching, in positions; llama3 and yarn
    low_rotations: float = 1.0  # waves that turn fewer times in original_length are stretched by the full factor
    high_rotations: float = 4.0  # waves that turn more often are not stretched (yarn: 32); in between, partly
    whole_bounds: bool = True  # yarn: the two bounds are rounded outwards to whole waves
    attention_factor: float = 1.0  # multiplies the cosines and sines (yarn)

    def __post_init__(self) -> None:
        check_field_types(self, "attention.rope_scaling.")
        for name in ("factor", "attention_factor", "low_rotations"):
            value = getattr(self, name)
            require(value > 0, f"attention.rope_scaling.{name}={value} must be > 0")
        require(
            self.original_length >= 1, f"attention.rope_scaling.original_length={self.original_length} must be >= 1"
        )
        require(
            self.low_rotations < self.high_rotations,
            f"attention.rope_scaling.low_rotations={self.low_rotations} must be below "
            f"high_rotations={self.high_rotations}",
        )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary positions.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    num_heads: int = 4  # H, query heads
    num_kv_heads: int = 2  # G, key/value heads; divides num_heads
    head_dim: int = 32  # A, width of a head
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_fraction: float = 1.0  # leading fraction of a head's width that is rotated
    rope_scaling: RopeScaling | None = None  # stretches the wavelengths for longer sequences; None: as they are
    mrope_section: tuple[int, ...] | None = None  # waves rotated by time, row, column, interleaved; None: by position
    qk_norm: bool = False  # RMSNorm of queries and keys, before they are rotated
    qk_norm_over: Literal["head", "width"] = "head"  # the norm's mean is over each head, or over all heads together
    qkv_bias: bool = False  # whether the maps to queries, keys and values have a bias
    out_bias: bool = False  # whether the map from the heads back to the stream has a bias
    clip_qkv: float | None = None  # queries, keys and values are clipped to [-clip_qkv, clip_qkv]; None: never

    def __post_init__(self) -> None:
        check_field_types(self, "attention.")
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            require(getattr(self, name) >= 1, f"attention.{name}={getattr(self, name)} must be >= 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}",
        )
        require(0 < self.rope_fraction <= 1, f"attention.rope_fraction={self.rope_fraction} must be in (0, 1]")
        require(
            self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
            f"attention.head_dim={self.head_dim} x rope_fraction={self.rope_fraction} = {self.rotary_dim} rotated "
            "dimensions; must be even and >= 2",
        )
        require(self.rope_theta > 0, f"attention.rope_theta={self.rope_theta} must be > 0")
        section = self.mrope_section
        fits = section is None or (len(section) == 3 and min(section) >= 0)
        require(fits, f"attention.mrope_section={section} must be three numbers of waves: of time, row and column")
        clip = self.clip_qkv
        require(clip is None or clip > 0, f"attention.clip_qkv={clip} must be > 0")

    @property
    def rotary_dim(self) -> int:
        return round(self.head_dim * self.rope_fraction)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: a weight W of the patterns becomes W + (alpha / rank) A B, where B starts at 0.

    Adapters fit the linear maps of attention, dense FFNs and shared experts, and the stacked matrices of the experts.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    rank: int = 8  # R, columns of A and rows of B
    alpha: float = 16.0  # the product A B is multiplied by alpha / rank
    patterns: tuple[str, ...] = ("**/attention/*/kernel",)  # which weights are adapted, by name
    experts: Literal["own", "shared"] = "own"  # own: an A and a B for each expert; shared: one pair for all of a layer

    def __post_init__(self) -> None:
        check_field_types(self, "stack.lora.")
        require(self.rank >= 1, f"stack.lora.rank={self.rank} must be >= 1")
        require(self.alpha > 0, f"stack.lora.alpha={self.alpha} must be > 0")
        require(len(self.patterns) > 0 and all(self.patterns), "stack.lora.patterns must hold patterns, none empty")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """The decoder's blocks: `num_dense_layers` with a dense FFN, then every `moe_every`-th with a mixture of experts.

    With num_dense_layers = num_layers the model is dense and the routing policy has no effect.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    d_model: int = 128  # D, width of the residual stream
    num_layers: int = 4  # layers, dense and MoE together
    num_dense_layers: int = 1  # leading layers without experts
    moe_every: int = 1  # after those, every moe_every-th layer is a mixture of experts; the others are dense
    d_ff: int = 384  # FFN width of the dense layers
    expert_d_ff: int = 32  # F, hidden width of an expert
    num_shared_experts: int = 1  # shared experts, each F wide, that every token uses in addition to the routed ones
    mlp_bias: bool = False  # whether the maps of the dense FFNs have biases
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    lora: LoraConfig | None = None  # low-rank adapters beside the weights; None: none
    execution: Execution = dataclasses.field(default_factory=Execution)  # how the MoE layers are computed
    remat: Remat = "none"  # what the backward pass recomputes; see core.remat.remat_policy
    scan_unroll: int = 1  # MoE layers per scan iteration; unrolling all saves copies of the layers' parameters
    dtype: Dtype = "float32"  # of activations and matmuls; router, norms, softmax and losses are always float32
    param_dtype: Dtype = "float32"  # of the weights

    def __post_init__(self) -> None:
        check_field_types(self)
        require_one_of("remat", self.remat, get_args(Remat))
        require_one_of("dtype", self.dtype, get_args(Dtype))
        require_one_of("param_dtype", self.param_dtype, get_args(Dtype))
        for name in ("d_model", "num_layers", "moe_every", "d_ff", "expert_d_ff", "scan_unroll"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be >= 1")
        require(self.num_layers <= MOST_LAYERS, f"num_layers={self.num_layers} must be <= {MOST_LAYERS}")
        require(self.scan_unroll <= MOST_LAYERS, f"scan_unroll={self.scan_unroll} must be <= {MOST_LAYERS}")
        require(self.num_shared_experts >= 0, f"num_shared_experts={self.num_shared_experts} must be >= 0")
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            f"num_dense_layers={self.num_dense_layers} must be in [0, num_layers={self.num_layers}]",
        )
        require(
            (self.num_layers - self.num_dense_layers) % self.moe_every == 0,
            f"moe_every={self.moe_every} must divide num_layers - num_dense_layers = "
            f"{self.num_layers - self.num_dense_layers}; set num_dense_layers to take up the rest",
        )
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be > 0")

    @property
    def num_moe_layers(self) -> int:
        """L, the number of MoE layers."""
        return (self.num_layers - self.num_dense_layers) // self.moe_every

    @property
    def residual_scale(self) -> float:
        """Initial scale of every projection into the residual stream, so that the stream's variance stays near one."""
        return (2 * self.num_layers) ** -0.5
