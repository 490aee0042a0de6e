"""Compiles a kernel for a GPU that is not attached and reads the resources it needs. All figures are static."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, Mesh, NamedSharding, PartitionSpec

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.core.hardware import Gpu
from anyexperts_jax.sharding.mesh import traced_for

_TARGETS = pathlib.Path(__file__).parent / "targets"
_TENSOR_CORES = re.compile(r"\b(wgmma|mma\.sync)\b")  # the instructions for matmuls
_BARRIERS = re.compile(r"num_barriers=(\d+)[^)]*\): (\d+)")  # barriers per array and number of arrays, in Mosaic's dump
_BARRIER_BYTES = 8
_DUMP_VARIABLE = "MOSAIC_GPU_DUMP_TO"
_INSTALL = "in a checkout, pip install -e '.[aot-gpu]'"
_PACKAGES = ("jax_cuda13_plugin", "nvidia.cu13")  # installed by the extra `aot-gpu`


class KernelReport(NamedTuple):
    """The resources of one kernel."""

    kernel: str
    threads: int
    registers: int  # per thread; 255 is the limit
    spill_bytes: int  # per thread, stores and loads
    shared_bytes: int  # per block
    tensor_cores: str  # "wgmma" or "mma.sync"
    tma: bool  # True: tiles are copied by the tensor memory accelerator


def complaints(report: KernelReport, gpu: Gpu) -> list[str]:
    """Everything that makes a kernel slow on `gpu`, or prevents its launch."""
    rules = {
        f"spills {report.spill_bytes} bytes": report.spill_bytes > 0,
        f"multiplies with {report.tensor_cores}, not {gpu.matmul}": report.tensor_cores != gpu.matmul,
        f"{report.shared_bytes} bytes of shared memory, {gpu.limits.shared_bytes} are there": (
            report.shared_bytes > gpu.limits.shared_bytes
        ),
        f"{report.threads} threads of {report.registers} registers, {gpu.registers} are there": (
            report.threads * report.registers > gpu.registers
        ),
    }
    return [text for text, broken in rules.items() if broken]


def missing_packages() -> list[str]:
    """The packages that a deviceless compile needs and that are not installed."""
    return [name for name in _PACKAGES if not _installed(name)]


def compile_kernel(fn: Callable[..., Any], args: tuple[Any, ...], gpu: Gpu) -> KernelReport:
    """Compiles `fn`, which calls one kernel, and reads the report.

    Args:
      args: trees of `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: if packages are missing, `fn` calls no kernel or several, or the compiler rejects the kernel.
    """
    missing = missing_packages()
    require(not missing, f"compiling for {gpu.device} needs {', '.join(missing)}: {_INSTALL}")
    with tempfile.TemporaryDirectory() as folder, _mosaic_dump(folder):
        lowered = _lower(fn, args, gpu)
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"})
        texts = {path: path.read_text() for path in sorted(pathlib.Path(folder).glob("*.ptx"))}
        kernels = [path for path, text in texts.items() if _TENSOR_CORES.search(text)]
        require(len(kernels) == 1, f"{len(kernels)} kernels with matmuls were compiled where one was expected")
        return _read(kernels[0], gpu)


def compile_for(fn: Callable[..., Any], args: tuple[Any, ...], gpu: Gpu) -> Any:
    """`fn` jitted and compiled for `gpu`.

    Args:
      args: trees of `jax.ShapeDtypeStruct`s.
    """
    return _lower(fn, args, gpu).compile()


def abstract_gpu(gpu: Gpu) -> contextlib.AbstractContextManager[Any]:
    """A context in which traces are for one `gpu`."""
    return traced_for(AbstractDevice(device_kind=gpu.device, num_cores=gpu.multiprocessors, platform="gpu"))


@contextlib.contextmanager
def _mosaic_dump(folder: str) -> Iterator[None]:
    """Makes Mosaic GPU dump its output. It compiles during lowering and has only an environment variable for this."""
    before = os.environ.get(_DUMP_VARIABLE)
    os.environ[_DUMP_VARIABLE] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DUMP_VARIABLE]
        else:
            os.environ[_DUMP_VARIABLE] = before


def _dynamic_shared_bytes(folder: pathlib.Path, kernel: str) -> int:
    """The shared memory requested at launch: Mosaic dumps its kernel's, XLA that of each kernel by name."""
    for path in folder.glob("*.resources.txt"):
        text = path.read_text()
        barriers = sum(int(each) * int(times) for each, times in _BARRIERS.findall(text))
        return _number(r"smem_scratch_bytes=(\d+)", text) + _BARRIER_BYTES * barriers
    launches = "".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    return _number(rf"\b{kernel}\b.*shared_memory: (\d+)", launches)


def _lower(fn: Callable[..., Any], args: tuple[Any, ...], gpu: Gpu) -> Any:
    sharding = NamedSharding(Mesh(np.array(_topology(gpu).devices[:1]), ("x",)), PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with abstract_gpu(gpu):
        return jax.jit(fn).lower(*placed)


def gpu_devices(gpu: Gpu, slices: int, nodes: int, per_node: int) -> list[Any]:
    """The devices of `slices` times `nodes` nodes of GPUs, to compile for.

    Raises:
      UserError: if packages are missing.
    """
    missing = missing_packages()
    require(not missing, f"compiling for {gpu.device} needs {', '.join(missing)}: {_INSTALL}")
    return list(_topology(gpu, f"{slices}x{nodes}x{per_node}").devices)


@functools.cache
def _topology(gpu: Gpu, shape: str = "1x1x1") -> Any:
    config = (_TARGETS / gpu.target).read_text()
    try:
        return topologies.get_topology_desc(topology_name="gpu", platform="cuda", target_config=config, topology=shape)
    except NotImplementedError as error:  # the plugin did not register itself, and has printed the reason
        raise UserError(f"JAX's plugin for GPUs did not load ({error}); compile with JAX_PLATFORMS=cpu") from error


def _read(ptx: pathlib.Path, gpu: Gpu) -> KernelReport:
    text = ptx.read_text()
    command = [_tool("ptxas"), "-v", f"-arch={gpu.arch}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True)
    require(done.returncode == 0, f"ptxas refuses the kernel: {one_line(done.stderr, 300)}")
    kernel = _first(r"\.entry\s+(\w+)", text)
    return KernelReport(
        kernel=kernel,
        threads=_number(r"\.reqntid\s+(\d+)", text) or _number(r"\.maxntid\s+(\d+)", text),
        registers=_number(r"Used (\d+) registers", done.stderr),
        spill_bytes=sum(_number(rf"(\d+) bytes spill {what}", done.stderr) for what in ("stores", "loads")),
        shared_bytes=max(_number(r"(\d+) bytes smem", done.stderr), _dynamic_shared_bytes(ptx.parent, kernel)),
        tensor_cores=_first(_TENSOR_CORES.pattern, text),
        tma="cp.async.bulk.tensor" in text,
    )


def _installed(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or _installed(parent)) and importlib.util.find_spec(name) is not None


def _tool(name: str) -> str:
    """Finds a CUDA tool, the wheel's own first: an older one may not understand the PTX of the wheel's XLA."""
    spec = importlib.util.find_spec("nvidia.cu13")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for path in (*(str(pathlib.Path(folder) / "bin" / name) for folder in folders), shutil.which(name)):
        if path and pathlib.Path(path).exists():
            return path
    raise UserError(f"no {name} found: {_INSTALL}")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _number(pattern: str, text: str) -> int:
    return int(_first(pattern, text) or 0)
