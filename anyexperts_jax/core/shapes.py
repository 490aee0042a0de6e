"""The MoE layer shapes that benchmarks time, kernels are compiled for and block-size tables list: each once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One MoE layer: N tokens of width D, each through K of E experts of width F."""

    tokens: int
    width: int
    hidden: int
    experts: int
    slots: int

    @property
    def rows(self) -> int:
        """Rows that all experts receive together."""
        return self.tokens * self.slots


SHAPES = {
    "S1": LayerShape(4096, 512, 512, 32, 8),
    "S2": LayerShape(2048, 1024, 704, 64, 6),
    "S3": LayerShape(1024, 2048, 768, 128, 8),
    "S4": LayerShape(16, 2048, 768, 128, 8),  # decoding
    # Sizes for an accelerator. P is the paper's layer; P4 is P with four times the tokens: 1024 rows per expert.
    "A": LayerShape(6144, 2048, 1408, 64, 8),
    "B": LayerShape(4096, 2048, 768, 128, 8),
    "P": LayerShape(8192, 2048, 512, 256, 8),
    "P4": LayerShape(32768, 2048, 512, 256, 8),
}
HOST_SHAPES = ("S1", "S2", "S3", "S4")  # small enough for a CPU
KERNEL_SHAPES = ("A", "B", "P")  # shapes that kernels are compiled at and block sizes are chosen for
