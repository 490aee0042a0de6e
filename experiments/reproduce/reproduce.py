"""Plans tables and figures, makes their runs, and writes their pages."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from anyexperts_jax.core.errors import comma_list, require
from anyexperts_jax.evolution.config import upcycled_model
from anyexperts_jax.models.init import parameter_count
from experiments.reproduce.collect import Results, collect, load_kept, save_kept
from experiments.reproduce.evomoe_output import is_evomoe, write_evomoe_page
from experiments.reproduce.experiment import CONFIGS, GROUPS, Run, load_experiment, runs_of, shared
from experiments.reproduce.layer_times import LayerTimes, load_layer_times, measure_layer_times, save_layer_times
from experiments.reproduce.maps import FIGURE4, FIGURE5, draw_maps
from experiments.reproduce.output import Page, write_page
from experiments.reproduce.pool import Outcome, run_all

_MAPS = {"figure4": FIGURE4, "figure5": FIGURE5}
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One table or figure and its runs by variant and seed."""

    name: str
    runs: dict[tuple[str, int], Run]


def plans(
    tables: Sequence[str], *, quick: bool = False, overrides: Sequence[str] = (), configs: pathlib.Path = CONFIGS
) -> list[Plan]:
    """Returns the plans of tables by name ("all": AnyExperts', "evomoe": EvoMoE's), or by the path of a .toml file.

    Raises:
      UserError: for an unknown or malformed experiment.
    """
    names = [name for table in tables for name in GROUPS.get(table, (table,))]
    found = []
    for name in dict.fromkeys(names):
        experiment, path = load_experiment(name, configs)
        found.append(Plan(path.stem, runs_of(experiment, path, quick=quick, overrides=overrides)))
    return found


def whole_page(tables: Sequence[str]) -> Sequence[str]:
    """Returns the tables to draw for a request: all of the same paper's page, or the given ones if they have none."""
    for group, names in GROUPS.items():
        if set(tables) <= {group, *names}:
            return (group,)
    return tables


def of_seeds(found: Sequence[Plan], seeds: Sequence[int]) -> list[Plan]:
    """Returns the plans with the runs of these seeds only.

    Raises:
      UserError: for a seed that no run has.
    """
    known = sorted({seed for plan in found for _, seed in plan.runs})
    for seed in seeds:
        require(seed in known, f"no run has seed {seed}; the seeds are {comma_list(known)}")
    return [Plan(plan.name, {key: run for key, run in plan.runs.items() if key[1] in seeds}) for plan in found]


def default_out(tables: Sequence[str], scale: str = "tiny") -> pathlib.Path:
    """Returns the folder of the page of `tables` in a checkout."""
    folder = pathlib.Path("experiments", "results", "reproduce")
    if whole_page(tables) == ("evomoe",):
        return folder / "evomoe"
    return folder if scale == "tiny" else folder / scale


def run_plans(
    found: Sequence[Plan],
    root: pathlib.Path,
    *,
    workers: int,
    deadline: float | None = None,
    note: Note = lambda line: None,
) -> Outcome:
    """Makes every run of the plans once, under `root`; finished ones are kept. See `pool.run_all`."""
    runs = shared([plan.runs for plan in found])
    return run_all(runs, root, workers=workers, deadline=deadline, note=note)


def write_plans(
    found: Sequence[Plan],
    root: pathlib.Path,
    out: pathlib.Path,
    command: str,
    *,
    quick: bool = False,
    note: Note = lambda line: None,
) -> Page:
    """Writes tables and figures of finished runs into `out`, with their results in runs.jsonl.

    Results come from `root`, or else from `out`'s runs.jsonl, so that a checkout can draw the committed results. Layer
    times are measured once and kept in `out`; so are importance maps, drawn if the checkpoint is there.

    Raises:
      UserError: if no run is done, or a file was not written by this version.
    """
    kept = load_kept(out)
    results = {plan.name: collect(plan.runs, root, kept) for plan in found}
    done = {one.id: one for each in results.values() for one in each.found.values()}
    require(len(done) > 0, f"no run of {', '.join(plan.name for plan in found)} is done in {root} or {out}")
    out.mkdir(parents=True, exist_ok=True)
    replaced = {run.older_id for plan in found for run in plan.runs.values() if run.id in done}
    save_kept({**{name: one for name, one in kept.items() if name not in replaced}, **done}, out)
    times = _layer_times(results, out, note)
    page = Page(results, command, parameters_of(found), quick, times, _start_steps(found))
    write = write_evomoe_page if is_evomoe(page.results) else write_page
    maps = _maps(found, root, out)  # before the page, which shows the maps it finds
    for path in [*write(page, out), *maps]:
        note(f"wrote {path}")
    return page


def parameters_of(found: Sequence[Plan]) -> int:
    """Returns the number of parameters of the first run's final model; other runs differ a little."""
    run = next(run for plan in found for run in plan.runs.values())
    model = run.config.model
    return parameter_count(model if run.evolve is None else upcycled_model(model, run.evolve.upcycle, run.evolve.moe))


def _start_steps(found: Sequence[Plan]) -> int | None:
    steps = {None if run.start is None else run.start.train.steps for plan in found for run in plan.runs.values()}
    return steps.pop() if len(steps) == 1 else None


def _layer_times(results: dict[str, Results], out: pathlib.Path, note: Note) -> LayerTimes | None:
    if "figure3" not in results:
        return None
    times = load_layer_times(out)
    if times is None:
        note("measuring layer times")
        times = measure_layer_times()
        save_layer_times(times, out)
    return times


def _maps(found: Sequence[Plan], root: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    paths = []
    for plan in found:
        kept = [run for run in plan.runs.values() if run.keep]
        for run in kept if plan.name in _MAPS else ():
            paths += draw_maps(run, root, _MAPS[plan.name], out, f"{plan.name}_{run.name.replace(' ', '_')}")
    return paths
