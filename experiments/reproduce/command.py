"""`python -m experiments.reproduce`: makes the requested runs, then the page they belong to."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from anyexperts_jax.core.errors import UserError, require, require_one_of
from experiments.reproduce.experiment import SCALES
from experiments.reproduce.readme import update_readme
from experiments.reproduce.reproduce import (
    Note,
    Plan,
    default_out,
    of_seeds,
    plans,
    run_plans,
    whole_page,
    write_plans,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of the command line.

    Raises:
      UserError: for an unknown scale, or a scale given with a file, which names its own base.
    """

    tables: Sequence[str]
    scale: str = "tiny"
    runs: pathlib.Path | None = None
    workers: int | None = None
    deadline: float | None = None
    quick: bool = False
    seeds: Sequence[int] | None = None
    set: Sequence[str] = ()
    only: str | None = None
    out: pathlib.Path | None = None
    readme: pathlib.Path | None = None

    def __post_init__(self) -> None:
        require_one_of("scale", self.scale, SCALES)
        for table in self.tables:
            require(
                self.scale == "tiny" or not table.endswith(".toml"),
                f"--scale {self.scale} is for tables by name; {table} has a base of its own, leave --scale out",
            )

    @property
    def command(self) -> str:
        """Returns the command that a page shows."""
        scale = "" if self.scale == "tiny" else f" --scale {self.scale}"
        return f"python -m experiments.reproduce {' '.join(self.tables)}{scale}{' --quick' if self.quick else ''}"

    @property
    def side_by_side(self) -> int:
        """Returns the number of runs at a time: one per core, or one on an accelerator."""
        if self.workers is not None:
            return self.workers
        return os.cpu_count() or 1 if self.scale == "tiny" else 1

    def page_folder(self, runs: pathlib.Path) -> pathlib.Path:
        """Returns the default folder of tables; a quick page is kept with its runs."""
        if self.quick:
            return runs / ("tables" if self.scale == "tiny" else f"tables_{self.scale}")
        return default_out(self.tables, self.scale)

    def plans(self, tables: Sequence[str]) -> list[Plan]:
        return plans(tables, quick=self.quick, overrides=self.set, configs=SCALES[self.scale])


def reproduce(request: Request, note: Note = lambda line: None) -> None:
    """Makes the runs and, once all are done, tables and figures, in the folders that the request names.

    Raises:
      UserError: for a bad request, or if runs failed.
      RunInterruptedError: after SIGINT or SIGTERM.
    """
    runs = request.runs or pathlib.Path("runs", "reproduce_quick" if request.quick else "reproduce")
    out = request.out or request.page_folder(runs)
    found = request.plans(request.tables)
    if request.seeds is not None:
        found = of_seeds(found, request.seeds)
    left = 0
    failed: Sequence = ()
    if request.only != "tables":
        outcome = run_plans(found, runs, workers=request.side_by_side, deadline=request.deadline, note=note)
        left, failed = len(outcome.left), outcome.failed
        note(f"{len(outcome.done)} runs are done, {len(failed)} failed, {left} are left")
    if left == 0 and request.only != "runs":
        drawn = request.plans(whole_page(request.tables))
        page = write_plans(drawn, runs, out, request.command, quick=request.quick, note=note)
        if request.readme:
            update_readme(page, out, request.readme)
    if failed:
        run, last = failed[0]
        raise UserError(
            f"{len(failed)} runs failed, the first {runs / run.id} ({run.name}): {last}; see log.txt there; "
            "the same command tries again"
        )
