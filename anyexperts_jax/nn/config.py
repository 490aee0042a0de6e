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
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made from one narrow latent.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    kv_rank: int = 512  # U, width of the latent that keys and values are made from
    query_rank: int | None = None  # width of the latent that queries are made from; None: they are made from the stream
    plain_dim: int = 128  # P, leading part of a head's queries and keys, which is not rotated
    rope_dim: int = 64  # the rest, which is rotated; its key is the same for all heads
    value_dim: int = 128  # W, width of a head's values
    interleaved: bool = True  # whether neighbours are rotated as a pair; false: i and i + rope_dim / 2
    score_factor: float = 1.0  # on the scores, beside 1 / sqrt(head_dim) (YaRN)
    latent_factor: float = 1.0  # on the normed latent of keys and values (LongCat-Flash)
    norm_eps: float = 1e-6  # added to the mean square in the norms of the latents

    def __post_init__(self) -> None:
        check_field_types(self, "attention.latent.")
        for name in ("kv_rank", "plain_dim", "rope_dim", "value_dim"):
            require(getattr(self, name) >= 1, f"attention.latent.{name}={getattr(self, name)} must be >= 1")
        rank = self.query_rank
        require(rank is None or rank >= 1, f"attention.latent.query_rank={rank} must be >= 1")
        require(self.rope_dim % 2 == 0, f"attention.latent.rope_dim={self.rope_dim} must be even")
        for name in ("score_factor", "latent_factor", "norm_eps"):
            require(getattr(self, name) > 0, f"attention.latent.{name}={getattr(self, name)} must be > 0")

    @property
    def cached_dim(self) -> int:
        """Numbers of a position in the cache: the latent and the rotated key."""
        return self.kv_rank + self.rope_dim


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary positions, or latent attention.

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
    latent: LatentConfig | None = None  # keys and values are made from a latent; None: from the stream

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
        if self.latent is not None:
            self._check_latent(self.latent)

    def _check_latent(self, latent: LatentConfig) -> None:
        parts = f"latent.plain_dim + rope_dim = {latent.plain_dim + latent.rope_dim}"
        fits = self.head_dim == latent.plain_dim + latent.rope_dim
        require(fits, f"attention.head_dim={self.head_dim} must be {parts}")
        heads = f"attention.num_kv_heads={self.num_kv_heads} must be num_heads={self.num_heads}"
        require(self.num_kv_heads == self.num_heads, f"{heads}: with a latent, every head has keys of its own")
        for name, without in (("rope_fraction", 1.0), ("mrope_section", None), ("qk_norm", False), ("clip_qkv", None)):
            value = getattr(self, name)
            require(value == without, f"attention.{name}={value} has no effect with a latent; leave it at {without}")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return round(self.head_dim * self.rope_fraction) if self.latent is None else self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def projected_dims(self) -> int:
        """Numbers that the maps of attention make of one position, all heads together: what a backward pass keeps."""
        heads = (self.num_heads + self.num_kv_heads) * (self.head_dim + self.value_dim)
        return heads if self.latent is None else heads + self.latent.cached_dim + (self.latent.query_rank or 0)


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
    # With moe_every=2: each mixture reads what the dense FFN of the layer before reads, and its own layer has a dense
    # FFN too, to whose output the mixture's is added (LongCat-Flash).
    shortcut: bool = False
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
        two = not self.shortcut or self.moe_every == 2
        require(two, f"shortcut=True needs moe_every=2, a dense layer before each mixture; it is {self.moe_every}")

    @property
    def num_moe_layers(self) -> int:
        """L, the number of MoE layers."""
        return (self.num_layers - self.num_dense_layers) // self.moe_every

    @property
    def residual_scale(self) -> float:
        """Initial scale of every projection into the residual stream, so that the stream's variance stays near one."""
        return (2 * self.num_layers) ** -0.5
