"""The chips of `hardware.toml`, the project's only table of chips. The file gives the source of each figure."""

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from anyexperts_jax.core.errors import require_one_of

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


class TpuLimits(NamedTuple):
    """The hardware limits on a TPU kernel's block sizes."""

    vmem_bytes: int  # per core
    cores: int  # per device; the cores share the work of every kernel
    name: str = ""  # "" for a device kind that is not in the table

    @property
    def vmem_limit(self) -> int:
        """Bytes of VMEM a kernel may use; the rest is left to the compiler's own buffers."""
        return self.vmem_bytes * 15 // 16


class GpuLimits(NamedTuple):
    """The hardware limits on a GPU kernel's tiles."""

    name: str  # "" for a device kind that is not in the table
    compute_capability: str
    shared_bytes: int  # the most shared memory a thread block can request
    wgmma: bool  # whether matmuls use Hopper's warpgroup instructions


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device's peak figures, in the units of `hardware.toml`."""

    name: str
    platform: str
    kinds: tuple[str, ...]
    tflops: float
    hbm_gib: float
    hbm_gbs: float
    link_gbs: float
    dcn_gbs: float
    per_chip: int

    @property
    def flops(self) -> float:
        """Peak FLOP/s."""
        return self.tflops * 1e12

    @property
    def hbm(self) -> int:
        """Bytes of device memory."""
        return round(self.hbm_gib * _GIB)

    @property
    def is_gpu(self) -> bool:
        return self.platform == "gpu"

    def has_kind(self, device_kind: str) -> bool:
        """Whether a device kind, as JAX names it, is this chip, so that its kernels use this chip's sizes."""
        return any(re.fullmatch(pattern, device_kind) for pattern in self.kinds)


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU."""

    cores: int
    vmem_mib: int
    clock_ghz: float
    wraps_at: int
    smallest: str

    @property
    def limits(self) -> TpuLimits:
        return TpuLimits(self.vmem_mib * _MIB, self.cores, self.name)


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """An NVIDIA GPU."""

    capability: str
    arch: str
    matmul: str
    shared_kib: int
    registers: int
    multiprocessors: int
    device: str
    target: str

    @property
    def limits(self) -> GpuLimits:
        return GpuLimits(self.name.upper(), self.capability, self.shared_kib * _KIB, self.matmul == "wgmma")


C = TypeVar("C", bound=Chip)


def chip(name: str) -> Tpu | Gpu:
    """Looks up a chip by name: "v5e", "h100" and so on.

    Raises:
      UserError: for an unknown name; lists the known ones.
    """
    table: dict[str, Tpu | Gpu] = {**tpus(), **gpus()}
    require_one_of("chip", name, table)
    return table[name]


@functools.cache
def tpus() -> dict[str, Tpu]:
    """The TPUs by name, in the table's order."""
    return {name: Tpu(name=name, **fields) for name, fields in _table().items() if fields.get("platform") == "tpu"}


@functools.cache
def gpus() -> dict[str, Gpu]:
    """The GPUs by name, in the table's order."""
    return {name: Gpu(name=name, **fields) for name, fields in _table().items() if fields.get("platform") == "gpu"}


def tpu_limits(device_kind: str | None) -> TpuLimits:
    """The limits of a device kind as JAX names it. None or an unknown kind: limits that fit any TPU."""
    found = _of_kind(tpus(), device_kind)
    least = _table()["least"]
    return TpuLimits(least["vmem_mib"] * _MIB, least["cores"]) if found is None else found.limits


def gpu_limits(device_kind: str | None) -> GpuLimits:
    """The limits of a device kind as JAX names it. None or an unknown kind: limits that fit any GPU since Ampere."""
    found = _of_kind(gpus(), device_kind)
    return GpuLimits("", "", _table()["least"]["shared_kib"] * _KIB, wgmma=False) if found is None else found.limits


def _of_kind(chips: Mapping[str, C], device_kind: str | None) -> C | None:
    return next((one for one in chips.values() if device_kind is not None and one.has_kind(device_kind)), None)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = (importlib.resources.files(__package__) / "hardware.toml").read_text()
    sections = tomllib.loads(text)
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        for name, fields in sections.items()
    }
