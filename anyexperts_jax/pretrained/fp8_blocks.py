"""8-bit checkpoints of DeepSeek's kind, read by dequantising.

A matrix is stored as float8 (E4M3) beside a scale for each of its blocks, usually of 128 x 128, under the matrix's name
with "_scale_inv" behind it: the value is the 8-bit number times the scale of its block. It is read as bfloat16, in
which such models were trained.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from anyexperts_jax.core.errors import comma_list, require, shown
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.sources import EIGHT_BIT, Reader, Source, TensorInfo

SETTINGS = "quantization_config"
_SCALE = "_scale_inv"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SHOWN = 4


def block_size(hub: HubConfig) -> tuple[int, int] | None:
    """Rows and columns of a block, where config.json says that the weights are 8-bit in blocks; else None."""
    settings = hub.get(SETTINGS)
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return None
    if settings.get("fmt", "e4m3") != "e4m3" or settings.get("activation_scheme", "dynamic") != "dynamic":
        return None
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(own) is int and own >= 1 for own in size):
        return None
    return size[0], size[1]


def without_settings(hub: HubConfig) -> HubConfig:
    """The configuration of the weights as they are read: they are no longer quantised."""
    return HubConfig({key: value for key, value in hub.values.items() if key != SETTINGS}, hub.where)


@dataclasses.dataclass(frozen=True, eq=False)
class DequantisedBlocks:
    """A `Source` whose 8-bit tensors are read as bfloat16, without those that hold their scales."""

    source: Source
    tensors: Mapping[str, TensorInfo]
    block: tuple[int, int]

    @classmethod
    def of(cls, source: Source, block: tuple[int, int]) -> "DequantisedBlocks":
        """Checks that every 8-bit tensor has scales of the right shape, and that nothing else has any.

        Raises:
          UserError: naming the tensors.
        """
        held = source.tensors
        small = [name for name, info in held.items() if info.stored in EIGHT_BIT]
        lost = [name for name in small if name + _SCALE not in held]
        require(not lost, f"{source.where}: {len(lost)} 8-bit tensors have no scales: {comma_list(lost[:_SHOWN])}")
        for name in small:
            wanted, found = _scale_shape(held[name].shape, block), held[name + _SCALE].shape
            told = f"{name}{_SCALE} is {list(found)}, blocks of {block[0]} x {block[1]} want {list(wanted)}"
            require(found == wanted, f"{source.where}: {told}")
        scales = {name + _SCALE for name in small}
        kept = {
            name: TensorInfo(info.shape, _BFLOAT16, f"{info.stored} blocks") if name + _SCALE in scales else info
            for name, info in held.items()
            if name not in scales
        }
        return cls(source, kept, block)

    @property
    def where(self) -> str:
        return self.source.where

    @contextlib.contextmanager
    def opened(self) -> Iterator[Reader]:
        with self.source.opened() as reader:
            yield _Dequantised(reader, self)


class _Dequantised:
    def __init__(self, reader: Reader, blocks: DequantisedBlocks) -> None:
        self._reader, self._blocks = reader, blocks

    def read(self, name: str) -> np.ndarray:
        value = self._reader.read(name)
        if self._blocks.source.tensors[name].stored not in EIGHT_BIT:
            return value
        return dequantised(value, self._reader.read(name + _SCALE), self._blocks.block)


def dequantised(
    value: Shaped[ndarray, "*more O I"], scale: Shaped[ndarray, "*more o i"], block: tuple[int, int]
) -> Shaped[ndarray, "*more O I"]:
    """The matrices in bfloat16: the product is made in float32 and rounded once."""
    wide = value.astype(np.float32)
    for axis, size in zip((-2, -1), block, strict=True):
        scale = np.take(scale, np.arange(value.shape[axis]) // size, axis=axis)
    wide *= scale.astype(np.float32)
    found: Any = wide.astype(_BFLOAT16)
    return found


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales of a tensor; a vector has none."""
    require(len(shape) >= 2, f"an 8-bit tensor of shape {shown(list(shape))} is no matrix")
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
