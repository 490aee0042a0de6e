"""Finds statically what can run during the exchange of rows between devices; compiles what `results` lacks.

    python -m experiments.bench.exchange_overlap [--only CHIP ...]    with libtpu; minutes a program on two cores

Compiles one layer of the 16B model, forward and backward, and reads from the compiler's schedule which expert kernels
lie between the start and the end of an all-to-all. The most that this can gain follows from `results/pods`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from anyexperts_jax.aot.topology import chip_of_topology, slice_devices
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.dispatch.apply import apply_plan
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import RoutingPlan, plan_spec
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from experiments.bench.pods import PODS, RESULTS, path_of

COMMAND = "python -m experiments.bench.exchange_overlap"
OPTION = "xla_tpu_enable_async_all_to_all"
SLICES, LENGTH, DEVICES = ("v5e:2x4", "v5p:2x2x2"), 4096, 8
CASES = ((1, True), (2, False), (2, True))  # chunks, with OPTION
AGAIN = 4 / 3  # the experts' forward pass is computed twice
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((?:%([\w.\-]+))?")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Counts in a program: all-to-alls of rows, those during which expert kernels run, and the kernels."""

    exchanges: int
    exchanges_beside: int
    kernels: int
    kernels_beside: int


def compile_layer(topology: str, chunks: int, beside: bool) -> str:
    """Compiles a layer's output and gradients: one sequence per device, the experts sharded over all devices."""
    model = model_preset("ling_mini_2")
    moe, width, hidden = model.moe, model.stack.d_model, model.stack.expert_d_ff
    spec = plan_spec(moe, num_sequences=DEVICES)
    execution = Execution(dispatch="exchange", exchange_chunks=chunks)
    placement = Placement(make_mesh(MeshConfig(data=1, expert=DEVICES), slice_devices(topology)))

    def total(x_ND: jax.Array, weights: tuple, ids_NK: jax.Array, shares_NK: jax.Array) -> jax.Array:
        none = jnp.zeros(len(ids_NK), jnp.int32)
        plan = RoutingPlan(ids_NK, shares_NK, none + 0.0, none + 0.5, none, none, none, {}, {}, spec)
        y_ND, _ = apply_plan(x_ND, plan, ExpertWeights(*weights), execution, placement)
        return jnp.sum(jnp.sin(y_ND.astype(jnp.float32)))

    def array(dtype: str, axes: tuple[str, ...], *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, jnp.dtype(dtype), sharding=NamedSharding(placement.mesh, placement.rules.spec(axes))
        )

    tokens, slots = DEVICES * LENGTH, moe.slots_bound
    wide = array("bfloat16", ("expert", "norm", "expert_mlp"), moe.num_experts, width, hidden)
    narrow = array("bfloat16", ("expert", "expert_mlp", "norm"), moe.num_experts, hidden, width)
    operands = (
        array("bfloat16", ("batch", "norm"), tokens, width),
        (wide, wide, narrow),
        array("int32", ("batch", "norm"), tokens, slots),
        array("float32", ("batch", "norm"), tokens, slots),
    )
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*operands)
    return lowered.compile(compiler_options={OPTION: "true"} if beside else {}).as_text()


def read_overlap(program: str) -> Overlap:
    """Reads the main computation's schedule; skips 32-bit all-to-alls, which carry the slots' experts and weights."""
    exchanges = kernels = kernels_beside = 0
    flying: dict[str, int] = {}  # kernels since the start of each unfinished all-to-all
    beside: set[str] = set()
    for line in program[program.index("\nENTRY") :].splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, result, kind, operand = found.groups()
        if kind in ("all-to-all", "all-to-all-start") and "bf16[" in result:
            exchanges += 1
            flying |= {name: 0} if kind == "all-to-all-start" else {}
        elif kind == "all-to-all-done" and flying.pop(operand, 0):
            beside.add(operand)
        elif "tpu_custom_call" in line:
            kernels += 1
            kernels_beside += bool(flying)
            flying = {start: count + 1 for start, count in flying.items()}
    return Overlap(exchanges, len(beside), kernels, kernels_beside)


def schedule_table(found: dict[str, dict[str, int]]) -> TextTable:
    head = ("program", "all-to-alls of rows", "with kernels beside them", "kernels", "beside an all-to-all")
    body = []
    for topology in SLICES:
        for chunks, beside in CASES:
            name = name_of(topology, chunks, beside)
            one = Overlap(**found[name]) if name in found else None
            counts = ("not compiled yet", "", "", "") if one is None else map(str, dataclasses.astuple(one))
            body.append((name, *counts))
    return TextTable("What the compiler schedules", head, tuple(body))


def gain_table() -> TextTable:
    """Bounds the gain by the pods' committed figures: chunks hide at most the shorter of experts and exchange."""
    head = ("pod", "exchange, ms", "experts, ms", "other arithmetic, ms", "gain at most", "two chunks' padding, ms")
    body = []
    for pod in PODS:
        step, chip = json.loads(path_of(pod).read_text()), chip_of_topology(pod.topology)
        if chip.is_gpu:
            continue
        rows = zip(step["collectives"], step["bounds"]["collectives"], strict=True)
        exchange = sum(seconds for row, seconds in rows if (row["kind"], row["axes"]) == ("all-to-all", ["expert"]))
        real, extra = step["work"]["real_flops"]["experts"], step["work"]["extra_flops"]["expert padding"]
        peak = step["devices"] * chip.flops
        experts, padding = AGAIN * (real + extra) / peak, AGAIN * extra / peak
        other = step["bounds"]["arithmetic"] - experts
        gain = min(experts, exchange) / (exchange + experts + other)
        times = [f"{1e3 * seconds:.1f}" for seconds in (exchange, experts, other)]
        body.append((pod.topology, *times, f"{gain:.1%}", f"{1e3 * padding:.1f}"))
    return TextTable("What chunks can gain at most, 16B model at the default budget", head, tuple(body))


NOTES = """\
`{command}`, with {versions}. Static: read from compilers or counted; nothing was run.

- One layer of the 16B model, forward and backward, one sequence of 4096 positions a device, experts over 8 devices.
  Without chunks the gradients of the experts' weights alone can run beside an all-to-all, that of the rows' gradients;
  the other kernels need all of its rows, or make them. With
  `model.stack.execution.exchange_chunks=2` one half of the positions can travel while the other is computed, but the
  compiler lets all-to-alls run beside other work only where libtpu is told so:
  `LIBTPU_INIT_ARGS=--{option}=true`.
- The gain: of a step's exchange, experts' matmuls and other arithmetic, one after the other at the chip's peaks, the
  share that is gone when the shorter of the first two is hidden behind the other. What two chunks cost: each expert has
  another tile that is half empty, and its weights are read once more.
- Decision: the option is there, and 1 by default until a TPU has timed it: the gain is bounded and the cost is sure.
"""


def markdown(tables: list[TextTable]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    text = ["# What runs beside the exchange", "", NOTES.format(command=COMMAND, versions=versions, option=OPTION)]
    for table in tables:
        head, *body = ("| " + " | ".join(row) + " |" for row in (table.columns, *table.rows))
        text += [f"## {table.title}", "", head, "|---" * len(table.columns) + "|", *body, ""]
    return "\n".join(text).rstrip() + "\n"


def name_of(topology: str, chunks: int, beside: bool) -> str:
    return f"{topology}, chunks={chunks}" + (f", {OPTION}" if beside else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=SLICES, help="compile for these alone (default: all)")
    options = parser.parse_args()
    figures, page = (RESULTS / f"exchange_overlap.{ending}" for ending in ("json", "md"))
    found = json.loads(figures.read_text()) if figures.exists() else {}
    for topology in SLICES:
        for chunks, beside in CASES:
            name = name_of(topology, chunks, beside)
            if name not in found and topology in options.only:
                print(f"compiling {name}", flush=True)
                found[name] = dataclasses.asdict(read_overlap(compile_layer(topology, chunks, beside)))
                figures.write_text(json.dumps(found, indent=1) + "\n")
    page.write_text(markdown([schedule_table(found), gain_table()]))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
