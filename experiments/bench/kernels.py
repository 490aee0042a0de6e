"""Compares the static time of the expert kernels on TPUs, none attached, with other libraries' kernels.

    python -m experiments.bench.kernels [--chip v5e ...] [--shape P ...] [--what ours tokamax ...] [--part forward]

Compiles what is selected and not yet in experiments/results/kernels_tpu.json, then writes that file, its table
(kernels_tpu.md) and tests/golden/tpu_kernels.json anew from all its figures. A figure is compiled again when anything
that determines it has changed: the versions, the sizes, or the source of our kernels. Nothing is run on a device.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from anyexperts_jax.aot import kernels, report, topology
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.ops.expert_mlp import pallas_tpu, reference, tpu_bodies, tpu_grid
from anyexperts_jax.ops.expert_mlp.tpu_sizes import TpuSizes
from experiments.bench import tpu_model, tpu_peers, tpu_table

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULT = ROOT / "experiments" / "results" / "kernels_tpu.json"
GOLDEN = ROOT / "tests" / "golden" / "tpu_kernels.json"
WHAT = ("ours", "tokamax", "megablox", "xla")
PARTS = ("forward", "backward")
NOTE = "static, no device run"


class Task(NamedTuple):
    """One program to compile, and everything that determines the result."""

    name: str  # "chip/shape/library/call"
    key: dict[str, Any]
    compile: Callable[[pathlib.Path], dict[str, Any]]


def our_program(
    call: str, shape: kernels.ExpertShape, sizes: TpuSizes
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """Returns one of our kernels with these sizes, as (function, abstract arguments)."""
    x, counts, *weights, d_y = kernels.arguments(shape)
    x, d_y = (jax.ShapeDtypeStruct((shape.experts, tpu_table.rows_of(shape), shape.width), a.dtype) for a in (x, d_y))
    row = jax.ShapeDtypeStruct((*x.shape[:2], shape.hidden), x.dtype)
    if call == "weights":
        return (lambda *a: pallas_tpu.weights_backward(*a, sizes=sizes)), [x, counts, row, row, row, d_y]
    if call == "backward":
        function = lambda x, counts, gate, up, *a: pallas_tpu.rows_backward(  # noqa: E731
            x, counts, (gate, up), *a, sizes=sizes
        )
        return function, [x, counts, row, row, *weights, d_y]
    keep = call == "forward_kept"
    return (lambda *a: pallas_tpu.forward(*a, sizes=sizes, keep=keep)), [x, counts, *weights]


def tasks(chips: list[str], shapes: list[str], what: list[str], parts: list[str]) -> Iterator[Task]:
    """Yields our kernels and forward passes first, the slowest to compile last."""
    selected = list(itertools.product(chips, shapes))
    calls = [call for call in tpu_model.OURS if ("forward" if call == "forward" else "backward") in parts]
    for call, (chip, name) in itertools.product(calls, selected if "ours" in what else ()):
        yield our_task(chip, name, call, tpu_table.sizes_for(chip, kernels.SHAPES[name]))
    for library in ("tokamax", "megablox"):
        yield from _peer_tasks(library, "forward", selected if library in what and "forward" in parts else [])
    xla = selected if "xla" in what and "forward" in parts else ()
    for call, (chip, name) in itertools.product(("ragged_dot", "einsum"), xla):
        yield _xla_task(chip, name, call)
    for library in ("megablox", "tokamax"):
        yield from _peer_tasks(library, "backward", selected if library in what and "backward" in parts else [])


def our_task(chip: str, name: str, call: str, sizes: TpuSizes) -> Task:
    """Returns the task that compiles one of our kernels with these sizes."""
    shape = kernels.SHAPES[name]
    function, arguments = our_program(call, shape, sizes)
    key = _key(chip, call, shape, sizes=vars(tpu_model.own_sizes(call, sizes)), vmem_bytes=sizes.vmem_bytes)
    key |= {"source": _source()} | versions()
    return Task(f"{chip}/{name}/ours/{call}", key, functools.partial(_summary, chip, function, arguments))


def _peer_tasks(library: str, part: str, selected: list[tuple[str, str]]) -> Iterator[Task]:
    for chip, name in selected:
        shape = kernels.SHAPES[name]
        for call, matmul in tpu_peers.matmuls(library, part, shape).items():
            program = tpu_peers.program(library, shape, matmul)
            key = _key(chip, f"{library} {matmul.kind}", shape, matmul=matmul._asdict()) | versions(library)
            yield Task(f"{chip}/{name}/{library}/{part}/{call}", key, functools.partial(_summary, chip, *program))


def _xla_task(chip: str, name: str, call: str) -> Task:
    shape = kernels.SHAPES[name]
    _, D, F, R = shape

    def ragged_dot(x_RD: Any, counts_E: Any, w_gate_EDF: Any, w_up_EDF: Any, w_down_EFD: Any) -> Any:
        gate, up = (jax.lax.ragged_dot(x_RD, w, counts_E) for w in (w_gate_EDF, w_up_EDF))
        return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down_EFD, counts_E)

    arguments = kernels.arguments(shape)[:5]
    function: Callable[..., Any] = reference.expert_mlp
    if call == "ragged_dot":
        function, arguments[0] = ragged_dot, jax.ShapeDtypeStruct((R, D), jnp.bfloat16)

    def compiled(directory: pathlib.Path) -> dict[str, Any]:
        del directory
        cost = topology.compile_for(chip, function, arguments).cost_analysis()
        return {"flops": cost["flops"], "bytes": cost["bytes accessed"], "useful_flops": 6 * D * F * R}

    return Task(f"{chip}/{name}/xla/{call}", _key(chip, call, shape) | versions(), compiled)


def _key(chip: str, call: str, shape: kernels.ExpertShape, **more: Any) -> dict[str, Any]:
    return {"chip": chip, "call": call, "shape": shape._asdict(), **more}


def _summary(chip: str, function: Any, arguments: Any, directory: pathlib.Path) -> dict[str, Any]:
    """Returns the summary of the only program with matmuls, or a line that says why there is none."""
    found = report.compile_report(chip, function, arguments, directory)
    if len(found) != 1:
        return {"unread": f"{len(found)} programs with matmuls where one was expected"}
    return found[0].summary()


def _source() -> str:
    """Returns a digest of the kernels' source files; the list of tiles is an input and not part of it."""
    files = [pathlib.Path(str(m.__file__)) for m in (pallas_tpu, tpu_bodies, tpu_grid)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions that determine a figure; megablox ships with JAX."""
    names = ["jax", "libtpu", *(p for p in packages if p != "megablox")]
    return {name: importlib.metadata.version(name) for name in names}


def compile_all(selected: Iterator[Task], result: pathlib.Path, seconds: float) -> None:
    """Compiles what `result` lacks under any name, saving each figure at once, until `seconds` have passed."""
    directory, begun = pathlib.Path(tempfile.mkdtemp()), time.monotonic()
    topology.open_compiler(directory)
    for task in selected:
        kept = load(result)
        known = [p for n, p in kept["programs"].items() if p["key"] == task.key and n != task.name]
        if kept["programs"].get(task.name, {}).get("key") == task.key:
            continue
        if not known and time.monotonic() - begun > seconds:
            print(f"stopped before {task.name}; the same command goes on from there", file=sys.stderr)
            return
        start = time.monotonic()
        kept["programs"][task.name] = known[0] if known else {"key": task.key, "found": _found(task, directory)}
        result.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(f"{task.name} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _found(task: Task, directory: pathlib.Path) -> dict[str, Any]:
    """Returns the compiler's figures, or the reason for its refusal."""
    try:
        return task.compile(directory)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return {"unread": f"refused: {' '.join(str(error).split())[:200]}"}


def load(result: pathlib.Path) -> dict[str, Any]:
    return json.loads(result.read_text()) if result.exists() else {"note": NOTE, "programs": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", default=list(tpus()), choices=tpus())
    parser.add_argument("--shape", nargs="+", default=list(kernels.SHAPES), choices=kernels.SHAPES)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="compile nothing more after so long")
    parser.add_argument("--result", type=pathlib.Path, default=RESULT)
    parser.add_argument("--golden", type=pathlib.Path, default=GOLDEN)
    args = parser.parse_args()
    compile_all(tasks(args.chip, args.shape, args.what, args.part), args.result, args.seconds)
    kept = load(args.result)
    kept |= {"command": "python -m experiments.bench.kernels", "note": NOTE, "versions": versions("tokamax")}
    kept["rows"] = tpu_table.rows(kept["programs"])
    args.result.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    table = tpu_table.markdown(kept)
    args.result.with_suffix(".md").write_text(table)
    args.golden.write_text(json.dumps(tpu_table.golden(kept), indent=1, sort_keys=True) + "\n")
    print(table)


if __name__ == "__main__":
    main()
