"""`reproduce`: the runs of tables and figures, and then the tables and figures."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from anyexperts_jax.reproduce.experiment import CONFIGS, TABLES, Experiment, Run, load_experiment, runs_of, shared
from anyexperts_jax.reproduce.pool import Outcome, run_all

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One table or figure and its runs by variant and seed."""

    name: str
    experiment: Experiment
    runs: dict[tuple[str, int], Run]


def plans(
    tables: Sequence[str], *, quick: bool = False, overrides: Sequence[str] = (), configs: pathlib.Path = CONFIGS
) -> list[Plan]:
    """The plans of tables by name ("all": every one), or of paths to .toml files.

    Raises:
      UserError: no such experiment, or a wrong one.
    """
    names = [name for table in tables for name in (TABLES if table == ALL else (table,))]
    found = []
    for name in dict.fromkeys(names):
        experiment, path = load_experiment(name, configs)
        runs = runs_of(experiment, path, quick=quick, overrides=overrides)
        found.append(Plan(path.stem, experiment, runs))
    return found


def run_plans(
    found: Sequence[Plan],
    root: pathlib.Path,
    *,
    workers: int,
    deadline: float | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Makes every run of the plans, each once, under `root`; what is done is kept. See `pool.run_all`."""
    runs = shared([plan.runs for plan in found])
    return run_all(runs, root, workers=workers, deadline=deadline, note=note)
