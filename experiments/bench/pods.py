"""Compiles the 16B AnyExperts model for pods if `experiments/results/pods` lacks it, then writes `pods.md` anew.

    python -m experiments.bench.pods [--only NAME ...]    with libtpu, for h100 the GPU compilers; hours on two cores

Nothing is run. One program is compiled for each pod. Figures for other budgets and sizes that follow exactly from it
are derived, and the tables tell compiled from derived figures.
"""

import argparse
import dataclasses
import json
import pathlib

import jax

from anyexperts_jax.aot.bounds import Bounds, find_bounds, train_demand
from anyexperts_jax.aot.collectives import Collective
from anyexperts_jax.aot.step import CompiledStep, compile_step
from anyexperts_jax.aot.step_tables import mesh_text, to_json
from anyexperts_jax.aot.topology import chip_of_topology, slice_devices
from anyexperts_jax.aot.work import Work, count_work
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.models.presets import static_twin
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.train.config import RunConfig, load_config
from anyexperts_jax.train.fit import state_bytes

ROOT = pathlib.Path(__file__).parents[1]
CONFIG, RESULTS = ROOT / "pods" / "ling_mini_2.toml", ROOT / "results"
BUDGETS = ("static top-8", "8.0", "7.2", "6.4", "4.8")
SCALING = ("2x2x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")  # of v5p
GIB, TERA = 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: a pod and a budget."""

    name: str
    topology: str
    budget: str = "8.0"

    def config(self) -> RunConfig:
        """One sequence of 4096 positions a device."""
        devices = len(slice_devices(self.topology))
        config = load_config(CONFIG, [f"train.batch_size={devices}"])
        if self.budget == BUDGETS[0]:
            return dataclasses.replace(config, model=static_twin(config.model, 8))
        moe = shift_budget(config.model.moe, float(self.budget))
        return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


PODS = (
    Case("v5e_16x16", "v5e:16x16"),
    Case("v6e_16x16", "v6e:16x16"),
    Case("v5p_8x8x8", "v5p:8x8x8"),
    Case("tpu7x_4x4x8", "tpu7x:4x4x8"),
    Case("h100_8x8", "h100:8x8"),
)
CHECKS = (  # compiled to check derived figures
    Case("v5e_16x16_4.8", "v5e:16x16", "4.8"),
    Case("v5p_2x2x4", "v5p:2x2x4"),
    Case("h100_8x8_4.8", "h100:8x8", "4.8"),
)


def path_of(case: Case) -> pathlib.Path:
    return RESULTS / "pods" / f"ling_mini_2_{case.name}.json"


def read(case: Case) -> dict | None:
    """Returns the figures of the case's program; None if missing or from the earlier exchange of a row per slot."""
    path = path_of(case)
    step = json.loads(path.read_text()) if path.exists() else None
    return step if step is not None and "rows_sent" in step["work"] else None


def write(case: Case, step: CompiledStep) -> None:
    path_of(case).write_text(json.dumps(to_json(step), indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Row:
    """A case with its figures; `step` was compiled for this case or for the one it is derived from."""

    case: Case
    config: RunConfig
    step: dict
    derived: bool
    collectives: tuple[Collective, ...]
    work: Work
    bounds: Bounds
    state: int

    def sent(self, kind: str) -> int:
        return sum(row.bytes for row in self.collectives if row.kind == kind)


def row_of(case: Case, base: Case, *, derive: bool = False) -> Row | None:
    """Returns the figures of `case`, from its own program or derived from `base`'s; None if neither is compiled.

    With `derive` they are derived even if its own program is compiled.

    Bytes exchanged follow the rows sent; all others depend on neither the budget nor the size of `fsdp`.
    """
    derived = derive or read(case) is None
    step = read(base if derived else case)
    if step is None:
        return None
    config = case.config()
    devices = slice_devices(case.topology)
    mesh = make_mesh(config.mesh, devices)
    sizes = dict(mesh.shape)
    work = count_work(config, sizes, devices[0].device_kind)
    share = work.rows_sent / len(devices) / (step["work"]["rows_sent"] / step["devices"])
    rows = tuple(
        Collective(row["kind"], tuple(row["axes"]), row["count"], round(row["bytes"] * share))
        if row["kind"] == "all-to-all" and row["axes"] == ["expert"]
        else Collective(row["kind"], tuple(row["axes"]), row["count"], row["bytes"])
        for row in step["collectives"]
    )
    state = state_bytes(config, mesh)
    chip = chip_of_topology(case.topology)
    bounds = find_bounds(train_demand(work, state), rows, list(mesh.devices.flat), sizes, chip)
    return Row(case, config, step, derived, rows, work, bounds, state)


def pods_table(rows: list[Row]) -> TextTable:
    head = ("pod", "devices", "mesh", "state, GiB", "temporaries, GiB", "program, GiB", "free", "compiled in, s")
    body = []
    for row in rows:
        memory = row.step["memory"]
        sizes = [f"{memory[name] / GIB:.2f}" for name in ("state and batch", "temporaries", "program")]
        mesh, free = mesh_text(row.step["mesh"]), f"{row.step['free']:.1%}"
        body.append((row.case.topology, str(row.step["devices"]), mesh, *sizes, free, f"{row.step['seconds']:.0f}"))
    return TextTable("Memory of a device at the default budget (all compiled)", head, tuple(body))


def bounds_table(rows: list[Row], title: str) -> TextTable:
    head = ("pod", "arithmetic, ms", "HBM, ms", "network, ms", "MFU at most")
    body = []
    for row in rows:
        times = (f"{1e3 * s:.1f}" for s in (row.bounds.arithmetic, row.bounds.hbm, row.bounds.network))
        body.append((row.case.topology, *times, f"{row.bounds.mfu:.1%}"))
    return TextTable(title, head, tuple(body))


def budgets_table(rows: list[Row]) -> TextTable:
    head = (
        "pod",
        "budget",
        "all-to-all, GiB",
        "expert TFLOP, real",
        "with tiles filled",
        "network, ms",
        "MFU at most",
        "",
    )
    body = []
    for row in rows:
        computed = row.work.real_flops["experts"] + row.work.extra_flops["expert padding"]
        figures = (f"{row.work.real_flops['experts'] / TERA:,.0f}", f"{computed / TERA:,.0f}")
        times = (f"{1e3 * row.bounds.network:.1f}", f"{row.bounds.mfu:.1%}", "derived" if row.derived else "compiled")
        body.append((row.case.topology, row.case.budget, f"{row.sent('all-to-all') / GIB:.2f}", *figures, *times))
    title = "Static top-8 beside budgets: all-to-all of a device and step, experts' matmuls of all devices and a step"
    return TextTable(title, head, tuple(body))


def scaling_table(rows: list[Row]) -> TextTable:
    head = ("pod", "devices", "state, GiB", "all-to-all, GiB", "all-gather, GiB", "network, ms", "MFU at most", "")
    body = []
    for row in rows:
        sent = (f"{row.sent(kind) / GIB:.2f}" for kind in ("all-to-all", "all-gather"))
        times = (f"{1e3 * row.bounds.network:.1f}", f"{row.bounds.mfu:.1%}", "derived" if row.derived else "compiled")
        devices = str(len(slice_devices(row.case.topology)))
        body.append((row.case.topology, devices, f"{row.state / GIB:.2f}", *sent, *times))
    return TextTable("Scaling at 4096 tokens a chip, default budget", head, tuple(body))


def checks_table(compiled: list[Row], derived: list[Row]) -> TextTable:
    head = ("pod", "budget", "all-to-all, GiB", "derived", "network, ms", "derived")
    body = []
    for pair in zip(compiled, derived, strict=True):
        sent = (f"{row.sent('all-to-all') / GIB:.2f}" for row in pair)
        times = (f"{1e3 * row.bounds.network:.1f}" for row in pair)
        body.append((pair[0].case.topology, pair[0].case.budget, *sent, *times))
    return TextTable("What is derived, beside programs that were compiled to check it", head, tuple(body))


NOTES = """\
`python -m experiments.bench.pods`, with {versions}. Static: every figure is read from a compiler or counted; nothing
was run, no time was measured. The model is [ling_mini_2](../pods/ling_mini_2.toml) with {parameters:.2f}B parameters,
float32 state, bfloat16 matmuls, `remat="full"`, one sequence of 4096 positions a device, experts over 8 devices,
everything else fully sharded.

- *Compiled*: the program of this very case was compiled. *Derived*: the collectives are those of the program compiled
  for the same chip at the default budget (v5p:8x8x8 for scaling), the bytes exchanged between experts in proportion to
  the rows sent: one for a token and a device that holds some of its experts, in buffers that the budget sizes.
  Temporaries are given for compiled programs alone; the state, which follows from the shardings, for all.
- A bound is the least time that the arithmetic, the memory traffic that cannot be avoided, or the links of the slice
  leave, at the peaks in `anyexperts_jax/core/hardware.toml`. MFU at most: real FLOPs over peak in the largest of them,
  with perfect overlap and every kernel at its peak. It rises as the budget falls where the network binds: fewer rows
  travel.
- Static top-8 and a budget of 8.0 send and compute alike; they differ in who gets the slots.{missing}
"""


def markdown(tables: list[TextTable], first: dict) -> str:
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "jaxlib"))
    absent = [case.topology for case in PODS if read(case) is None]
    missing = f"\n- Not compiled yet: {', '.join(absent)}." if absent else ""
    text = ["# The 16B model on pods", ""]
    text += [NOTES.format(versions=versions, parameters=first["parameters"] / 1e9, missing=missing)]
    for table in tables:
        head, *body = ("| " + " | ".join(row) + " |" for row in (table.columns, *table.rows))
        text += [f"## {table.title}", "", head, "|---" * len(table.columns) + "|", *body, ""]
    return "\n".join(text).rstrip() + "\n"


def rows_of(cases: list[tuple[Case, Case]], *, derive: bool = False) -> list[Row]:
    return [row for row in (row_of(case, base, derive=derive) for case, base in cases) if row is not None]


def report() -> str:
    """Returns all tables of the compiled programs."""
    by_budget = [
        (next((c for c in CHECKS if (c.topology, c.budget) == (pod.topology, budget)), named(pod, budget)), pod)
        for pod in PODS
        for budget in BUDGETS
    ]
    v5p = next(pod for pod in PODS if pod.topology == f"v5p:{SCALING[4]}")
    scaling = [(Case(f"v5p_{shape}", f"v5p:{shape}"), v5p) for shape in SCALING]
    checks = [(case, of_chip(case)) for case in CHECKS if read(case) is not None and read(of_chip(case)) is not None]
    pods = rows_of([(pod, pod) for pod in PODS if read(pod) is not None])
    tables = [
        pods_table(pods),
        bounds_table(pods, "Bounds on a step at the default budget"),
        budgets_table(rows_of(by_budget)),
        scaling_table(rows_of(scaling)),
        checks_table(rows_of(checks), rows_of(checks, derive=True)),
    ]
    return markdown(tables, pods[0].step)


def of_chip(case: Case) -> Case:
    """The pod of the case's chip, at the default budget."""
    return next(pod for pod in PODS if pod.topology.partition(":")[0] == case.topology.partition(":")[0])


def named(pod: Case, budget: str) -> Case:
    return pod if budget == pod.budget else Case(f"{pod.name}_{budget.replace(' ', '_')}", pod.topology, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="compile these alone (default: all that are missing)")
    options = parser.parse_args()
    try:
        for case in (*PODS, *CHECKS):
            if read(case) is not None or (options.only is not None and case.name not in options.only):
                continue
            print(f"compiling {case.name}", flush=True)
            write(case, compile_step(case.config(), case.topology))
            jax.clear_caches()
        (RESULTS / "pods.md").write_text(report())
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {RESULTS / 'pods.md'}")


if __name__ == "__main__":
    main()
