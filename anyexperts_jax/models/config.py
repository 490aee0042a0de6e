"""The configuration of a model. Each part has a dataclass of its own, which is checked when it is made."""

import dataclasses
import math

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import NUM_MODALITIES
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.nn.config import MOST_LAYERS, StackConfig


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The encoder of image and video patches.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    patch_features: int = 192  # X of a patch: height * width * channels
    place_frequencies: int = 18  # waves that encode a patch's row, and as many its column
    max_frames: int = 16  # rows of the table of frame times
    num_layers: int = 0  # transformer layers in which the patches of one frame see each other
    d_ff: int = 256  # hidden width of its MLPs

    def __post_init__(self) -> None:
        _require_sizes("vision", self, ("patch_features", "place_frequencies", "max_frames", "d_ff"))


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The encoder of stacked log-mel frames.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    frame_features: int = 160  # X of a frame: mel bands * frames per chunk
    num_layers: int = 0  # transformer layers in which the frames of one clip see each other
    d_ff: int = 256  # hidden width of its MLPs

    def __post_init__(self) -> None:
        _require_sizes("audio", self, ("frame_features", "d_ff"))


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig:
    """The vision transformer of published models (Qwen3-VL): patches in, rows for the stream out.

    Each picture, or each pair of frames of a video, is read on its own. A square of merge x merge patches gives one
    row, and the outputs of some layers are added to the stream after the decoder's first layers.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    patch_size: int = 16  # pixels of a patch's side
    temporal_patch_size: int = 2  # frames in one patch; a picture is repeated
    channels: int = 3  # of a pixel
    merge: int = 2  # patches of a merged square's side
    d_model: int = 1152  # width of the tower
    num_layers: int = 27  # blocks of attention and MLP
    num_heads: int = 16  # of attention; the head width is a multiple of 4, for two halves rotate by row and by column
    d_ff: int = 4304  # hidden width of its MLPs
    side: int = 48  # places of the learned grid of positions, in each direction; it is stretched over a picture's grid
    deep_layers: tuple[int, ...] = (8, 16, 24)  # blocks whose outputs go to the decoder's first layers, rising
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-6  # added to the variance in LayerNorm

    def __post_init__(self) -> None:
        names = ("patch_size", "temporal_patch_size", "channels", "merge", "d_model", "num_heads", "d_ff", "side")
        _require_sizes("vision_tower", self, names)
        width = f"vision_tower.d_model={self.d_model} / num_heads={self.num_heads}"
        require(self.d_model % (4 * self.num_heads) == 0, f"{width} must be a multiple of 4")
        deep = f"vision_tower.deep_layers={self.deep_layers}"
        rises = list(self.deep_layers) == sorted(set(self.deep_layers))
        inside = all(0 <= layer < self.num_layers for layer in self.deep_layers)
        require(rises and inside, f"{deep} must rise within the {self.num_layers} layers of the tower")
        for name in ("rope_theta", "norm_eps"):
            require(getattr(self, name) > 0, f"vision_tower.{name}={getattr(self, name)} must be > 0")

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """Of a patch: channels, frames, rows and columns of pixels."""
        return (self.channels, self.temporal_patch_size, self.patch_size, self.patch_size)

    @property
    def patch_features(self) -> int:
        """X, numbers of a patch."""
        return math.prod(self.patch_shape)


@dataclasses.dataclass(frozen=True)
class AudioTowerConfig:
    """The audio transformer of published models (Qwen3-Omni): log-mel frames in, rows for the stream out.

    Three convolutions read a chunk of frames at a time, and leave an eighth of them. Attention is among the rows of
    some chunks that follow one another, a window.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    mel_bins: int = 128  # of a frame
    chunk_frames: int = 100  # frames that the convolutions read at a time
    window_chunks: int = 8  # chunks whose rows attend to one another
    channels: int = 480  # of the convolutions
    d_model: int = 1280  # width of the tower, even
    num_layers: int = 32  # blocks of attention and MLP
    num_heads: int = 20  # of attention
    d_ff: int = 5120  # hidden width of its MLPs
    norm_eps: float = 1e-5  # added to the variance in LayerNorm

    def __post_init__(self) -> None:
        names = ("mel_bins", "chunk_frames", "window_chunks", "channels", "d_model", "num_heads", "d_ff")
        _require_sizes("audio_tower", self, names)
        width = f"audio_tower.d_model={self.d_model}"
        require(self.d_model % self.num_heads == 0, f"{width} must be a multiple of num_heads={self.num_heads}")
        require(self.d_model % 2 == 0 and self.d_model >= 4, f"{width} must be even and >= 4")
        require(self.norm_eps > 0, f"audio_tower.norm_eps={self.norm_eps} must be > 0")

    def rows(self, frames: int) -> int:
        """The rows that a chunk of so many frames gives."""
        return -(-frames // 8)

    @property
    def chunk_rows(self) -> int:
        """R, rows of a whole chunk."""
        return self.rows(self.chunk_frames)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A multimodal decoder: encoders and embeddings, the stack of blocks, its routing policy, the output head.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    vocab_size: int = 260  # Y, the number of token ids
    max_length: int = 128  # the most positions of a sequence, T
    pad_id: int = 256  # the tokenizer's padding id, which generation writes after the end
    eos_id: int = 259  # the tokenizer's end id, which stops generation
    tie_embeddings: bool = False  # whether the output head shares the table of token embeddings
    modality_embedding: bool = True  # whether a learned vector of its modality is added to every position
    stack: StackConfig = dataclasses.field(default_factory=StackConfig)
    moe: AnyExpertsConfig = dataclasses.field(default_factory=AnyExpertsConfig)
    vision: VisionConfig | None = dataclasses.field(default_factory=VisionConfig)  # None: no image, no video
    audio: AudioConfig | None = dataclasses.field(default_factory=AudioConfig)  # None: no audio
    vision_tower: VisionTowerConfig | None = None  # of a published model, which is given pictures on their own
    audio_tower: AudioTowerConfig | None = None  # of a published model, which is given sounds on their own

    def with_execution(self, execution: Execution) -> "ModelConfig":
        """Returns the same model, computed as `execution` says."""
        return dataclasses.replace(self, stack=dataclasses.replace(self.stack, execution=execution))

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("vocab_size", "max_length"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be >= 1")
        for name in ("pad_id", "eos_id"):
            value = getattr(self, name)
            require(0 <= value < self.vocab_size, f"{name}={value} must be in [0, vocab_size={self.vocab_size})")
        router, modalities = self.moe.router, self.moe.router_modalities
        require(
            router == "linear" or modalities == NUM_MODALITIES or bool(self.moe.router_of_modality),
            f"moe.router={router!r} with moe.router_modalities={modalities}: a multimodal model has {NUM_MODALITIES}",
        )
        require(
            not self.stack.shortcut or self.moe.switches.hsm_site != "residual",
            "stack.shortcut=True with moe.switches.hsm_site='residual': the experts do not read the stream there",
        )
        require(
            self.vision_tower is None or self.stack.attention.mrope_section is not None,
            "vision_tower needs stack.attention.mrope_section: its rows are rotated by their place in the picture",
        )
        require(
            self.audio_tower is None or self.vision_tower is not None,
            "audio_tower needs vision_tower: no published model that hears without seeing is supported",
        )

    @property
    def router_bias_shape(self) -> tuple[int, ...]:
        """[L, C] of the expert biases, or [L, M, C].

        A dense model has one row, because a checkpoint cannot hold an empty array.
        """
        return max(self.stack.num_moe_layers, 1), *self.moe.bias_shape


def _require_sizes(
    part: str, config: VisionConfig | AudioConfig | VisionTowerConfig | AudioTowerConfig, names: tuple[str, ...]
) -> None:
    check_field_types(config, f"{part}.")
    for name in names:
        require(getattr(config, name) >= 1, f"{part}.{name}={getattr(config, name)} must be >= 1")
    layers = f"{part}.num_layers={config.num_layers}"
    require(config.num_layers >= 0, f"{layers} must be >= 0")
    require(config.num_layers <= MOST_LAYERS, f"{layers} must be <= {MOST_LAYERS}")
