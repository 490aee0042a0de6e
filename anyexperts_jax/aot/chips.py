"""The chips' peaks, from `chips.toml`, which says where each figure comes from."""

import dataclasses
import functools
import importlib.resources
import tomllib

from anyexperts_jax.core.errors import require_one_of

GPUS = ("h100",)


@dataclasses.dataclass(frozen=True)
class ChipPeaks:
    """What one device can do at most, in FLOP/s, bytes and bytes/s; see `chips.toml` for each."""

    name: str
    tflops: float
    hbm_gib: float
    hbm_gbs: float
    link_gbs: float
    wraps_at: int
    per_chip: int
    dcn_gbs: float

    @property
    def flops(self) -> float:
        return self.tflops * 1e12

    @property
    def hbm(self) -> int:
        return round(self.hbm_gib * 2**30)

    @property
    def is_gpu(self) -> bool:
        return self.name in GPUS


@functools.cache
def chip_peaks(name: str) -> ChipPeaks:
    """The peaks of "v5e", "h100" and so on.

    Raises:
      UserError: an unknown chip; lists the known.
    """
    table = tomllib.loads((importlib.resources.files("anyexperts_jax.aot") / "chips.toml").read_text())
    require_one_of("chip", name, table)
    return ChipPeaks(name, **table[name])
