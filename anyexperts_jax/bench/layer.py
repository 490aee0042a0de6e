"""`anyexperts bench layer`: the time of one MoE layer and that of transformers, of its parts, and by budget.

    anyexperts bench layer --out experiments/results

All rows of a table are interleaved (A B A B). Times are medians, and ratios are medians of the ratios within a round.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from anyexperts_jax.bench import cases as bench_cases
from anyexperts_jax.bench.cases import Compiled
from anyexperts_jax.bench.output import environment, markdown, write_files
from anyexperts_jax.bench.peers import PEER, has_transformers, transformers_layer
from anyexperts_jax.bench.stopwatch import Rounds, interleaved_rounds
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.shapes import HOST_SHAPES, SHAPES, LayerShape
from anyexperts_jax.core.text_table import TextTable

DTYPES = ("float32", "bfloat16")
BUDGETS = (8.0, 7.2, 6.4, 5.6, 4.8, 4.0)
BUDGET_SLOTS = 12  # the paper's k_max, the static width of slot arrays in the budget sweep
BUDGET_SHAPES = ("S1", "A", "P", "P4")
ONE_EXPERT = "one expert, same rows"
RAGGED_DOT = "jax.lax.ragged_dot"
RAGGED_LIMIT = 4 * 2**30  # most bytes of a ragged_dot's expanded operand on a GPU; at P it would be 64 GiB
PARTS = ("route", "sort", "gather", "combine")


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """One row of the comparison. `ratio` is relative to transformers' time in the same round; None if that did not
    run."""

    shape: str
    dtype: str
    run: str  # forward, forward+backward
    form: str  # includes the implementation if it is not the default
    milliseconds: float
    ratio: float | None
    temporary_mib: float | None  # memory besides operands and results, as XLA reports it, so only for JAX programs
    dropped: float  # share of slots that were dropped
    others_load: float | None  # cores kept busy by other processes; times are noisy above 0.1

    def line(self) -> str:
        return f"{self.shape} {self.dtype} {self.run}, {self.form}: {_milliseconds(self.milliseconds)} ms"


@dataclasses.dataclass(frozen=True)
class PartTime:
    """A part of an AnyExperts layer's forward pass. "overhead" is everything except the experts."""

    shape: str
    dtype: str
    part: str
    milliseconds: float
    share: float

    def line(self) -> str:
        return f"{self.shape} {self.dtype} forward, {self.part}: {_milliseconds(self.milliseconds)} ms"


@dataclasses.dataclass(frozen=True)
class BudgetTime:
    """The time of moe_apply at a budget; ratios are relative to the first budget."""

    shape: str
    dtype: str
    run: str
    form: str
    real: float
    milliseconds: float
    ratio: float
    ideal: float  # real experts relative to the first budget

    def line(self) -> str:
        where = f"{self.shape} {self.dtype} {self.run}, {self.form} at {self.real:g} real"
        return f"{where}: {_milliseconds(self.milliseconds)} ms"


Row = TypeVar("Row", LayerTime, PartTime, BudgetTime)


@dataclasses.dataclass(frozen=True)
class LayerBench:
    """All tables of one run, and the environment that produced them."""

    environment: dict[str, Any]
    layers: tuple[LayerTime, ...]
    parts: tuple[PartTime, ...]
    budgets: tuple[BudgetTime, ...]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How a comparison is timed.

    patience: seconds to wait, before each comparison, until the machine is otherwise idle.
    repeats: calls per sample (`stopwatch.interleaved_rounds`).
    """

    rounds: int = 7
    patience: float = 0.0
    repeats: int = 1

    def run(self, calls: dict[str, Callable[[], Any]]) -> Rounds:
        return interleaved_rounds(calls, self.rounds, self.patience, self.repeats)


def bench_layer(
    shapes: Sequence[str] = HOST_SHAPES,
    dtypes: Sequence[str] = DTYPES,
    timing: Timing | None = None,
    implementations: Sequence[str | None] = (None,),
    note: Callable[[str], None] = lambda line: None,
) -> LayerBench:
    """Runs every table. The float32 backward pass of S3 needs about 12 GB; S1 needs 3.

    Args:
      implementations: the implementations of the expert ops to compare; the other tables use the first. None is the
        platform's default.
      note: called with a line for every row when it is measured.

    Raises:
      UserError: for an unknown shape, dtype or implementation, one that cannot run here, or rounds or repeats < 1.
    """
    for name in shapes:
        require_one_of("shape", name, list(SHAPES))
    for dtype in dtypes:
        require_one_of("dtype", dtype, DTYPES)
    timing = timing or Timing()
    for amount in ("rounds", "repeats"):
        require(getattr(timing, amount) >= 1, f"{amount}={getattr(timing, amount)} must be >= 1")
    for implementation in implementations:
        if implementation is not None:
            require_one_of("implementation", implementation, bench_cases.implementations())
    names = ", ".join(implementation or "the platform's" for implementation in implementations)
    made_with = environment(timing.rounds) | {"implementation": names, "calls_a_sample": timing.repeats}
    layers: list[LayerTime] = []
    parts: list[PartTime] = []
    budgets: list[BudgetTime] = []
    for name, dtype in ((name, dtype) for name in shapes for dtype in dtypes):
        case = (name, SHAPES[name], dtype, timing)
        for backward in (False, True) if name != "S4" else (False,):
            layers += _noted(note, compare_layers(*case, implementations, backward=backward))
        parts += _noted(note, time_parts(*case, implementations[0]))
        for backward in (False, True) if name in BUDGET_SHAPES else ():
            budgets += _noted(note, time_budgets(*case, implementations[0], backward=backward))
    return LayerBench(made_with, tuple(layers), tuple(parts), tuple(budgets))


def _noted(note: Callable[[str], None], rows: list[Row]) -> list[Row]:
    """Notes and returns the rows, after freeing the arrays and programs they were measured with."""
    gc.collect()
    for row in rows:
        note(row.line())
    return rows


def compare_layers(
    name: str,
    shape: LayerShape,
    dtype: str,
    timing: Timing,
    implementations: Sequence[str | None] = (None,),
    *,
    backward: bool,
) -> list[LayerTime]:
    """Compares plain top-k, which every library runs: ours in two forms, one expert on the same number of rows, and, if
    available, transformers and `jax.lax.ragged_dot` (not on a CPU, where it takes at least 20 times as long)."""
    plan = bench_cases.top_k_plan(shape)
    x_ND, weights = bench_cases.operands(shape, dtype)
    how = {"backward": backward}
    cases: dict[str, Callable[[], Compiled]] = {}
    for own in implementations:
        suffix = "" if own is None else f", {own}"
        for form, dispatch in (("blocks", "blocks"), ("capacity 1.25", "capacity")):
            cases[form + suffix] = functools.partial(
                bench_cases.layer, plan, x_ND, weights, dispatch, implementation=own, **how
            )
    cases[ONE_EXPERT] = functools.partial(bench_cases.one_expert, shape, x_ND, weights, implementations[0], **how)
    if jax.default_backend() != "cpu" and bench_cases.ragged_bytes(shape) <= RAGGED_LIMIT:
        cases[RAGGED_DOT] = functools.partial(bench_cases.ragged_layer, plan, x_ND, weights, **how)
    ours = compile_together(cases)
    calls: dict[str, Callable[[], Any]] = {form: one.call for form, one in ours.items()}
    if has_transformers():
        peer = transformers_layer(x_ND, plan.expert_ids_NK, plan.weights_NK, weights, backward=backward)
        calls = {PEER: peer, **calls}
    found = timing.run(calls)
    dropped = bench_cases.capacity_drops(plan, x_ND, weights)
    return [
        LayerTime(
            shape=name,
            dtype=dtype,
            run=_run(backward),
            form=form,
            milliseconds=found.milliseconds(form),
            ratio=found.ratio(form, PEER) if PEER in calls else None,
            temporary_mib=ours[form].temporary_mib if form in ours else None,
            dropped=dropped if form.startswith("capacity") else 0.0,
            others_load=found.others_load,
        )
        for form in calls
    ]


def time_parts(
    name: str, shape: LayerShape, dtype: str, timing: Timing, implementation: str | None = None
) -> list[PartTime]:
    """The forward times of the parts of an AnyExperts layer. The experts' part is the rest after all others."""
    x_ND, weights = bench_cases.operands(shape, dtype)
    found = timing.run(_calls(bench_cases.layer_parts(shape, x_ND, weights, implementation)))
    milliseconds = {part: found.milliseconds(part) for part in found.seconds}
    overhead = sum(milliseconds[part] for part in PARTS)
    milliseconds |= {"overhead": overhead, "experts": milliseconds["layer"] - overhead}
    return [PartTime(name, dtype, part, own, own / milliseconds["layer"]) for part, own in milliseconds.items()]


def time_budgets(
    name: str, shape: LayerShape, dtype: str, timing: Timing, implementation: str | None = None, *, backward: bool
) -> list[BudgetTime]:
    """moe_apply at each budget. Dropless uses one program for all budgets, capacity one for each."""
    x_ND, weights = bench_cases.operands(shape, dtype)
    plans = {real: bench_cases.budget_plan(shape, BUDGET_SLOTS, real) for real in BUDGETS}
    first = f"{BUDGETS[0]:g}"
    rows = []
    for form in ("blocks", "capacity"):
        cases = {
            f"{real:g}": functools.partial(
                bench_cases.layer, plan, x_ND, weights, form, implementation=implementation, backward=backward
            )
            for real, plan in plans.items()
        }
        found = timing.run(_calls(compile_together(cases)))
        for real in BUDGETS:
            own = f"{real:g}"
            ratio, ideal = found.ratio(own, first), real / BUDGETS[0]
            rows.append(
                BudgetTime(
                    name,
                    dtype,
                    run=_run(backward),
                    form=form,
                    real=real,
                    milliseconds=found.milliseconds(own),
                    ratio=ratio,
                    ideal=ideal,
                )
            )
    return rows


def compile_together(cases: Mapping[str, Callable[[], Compiled]]) -> dict[str, Compiled]:
    """Compiles all cases in parallel, one per core: GPU compilers are single-threaded."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {name: pool.submit(case) for name, case in cases.items()}
        return {name: one.result() for name, one in found.items()}


def _calls(cases: dict[str, Compiled]) -> dict[str, Callable[[], Any]]:
    return {name: one.call for name, one in cases.items()}


def _run(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def layer_tables(bench: LayerBench) -> list[TextTable]:
    """The run as tables: comparison, parts, budgets."""
    layers = [
        (
            f"{one.shape} {one.dtype} {one.run}",
            one.form,
            _milliseconds(one.milliseconds),
            "-" if one.ratio is None else f"{one.ratio:.2f}",
            "-" if one.temporary_mib is None else f"{one.temporary_mib:.0f}",
            f"{one.dropped:.1%}",
            "-" if one.others_load is None else f"{one.others_load:.1f}",
        )
        for one in bench.layers
    ]
    parts = [
        (f"{one.shape} {one.dtype}", one.part, _milliseconds(one.milliseconds), f"{one.share:.1%}")
        for one in bench.parts
    ]
    budgets = [
        (
            f"{one.shape} {one.dtype} {one.run} {one.form}",
            f"{one.real:.1f}",
            _milliseconds(one.milliseconds),
            f"{one.ratio:.2f}",
            f"{one.ideal:.2f}",
        )
        for one in bench.budgets
    ]
    columns = ("layer", "form", "ms", "over transformers", "temporaries MiB", "dropped", "others' load")
    first = f"over {BUDGETS[0]:g}"
    return [
        TextTable("Plain top-k", columns, tuple(layers), names=2),
        TextTable("Parts of an AnyExperts layer, forward", ("layer", "part", "ms", "share"), tuple(parts), names=2),
        TextTable("Time against real experts", ("layer", "real", "ms", first, "ideal"), tuple(budgets)),
    ]


def write_bench(bench: LayerBench, folder: pathlib.Path, command: str) -> tuple[pathlib.Path, ...]:
    """Writes bench_layer.json, .csv (the comparison) and .md to `folder` and returns their paths."""
    text = markdown("One MoE layer", command, bench.environment, layer_tables(bench))
    return write_files(folder, "bench_layer", command, bench=bench, rows=bench.layers, text=text)
