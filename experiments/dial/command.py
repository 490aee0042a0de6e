"""All trainings and measurements of a plan, then the page."""

import dataclasses
import json
import pathlib

from rich.console import Console

from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.text_table import print_tables
from anyexperts_jax.train.run_dir import write_whole
from anyexperts_jax.train.runtime import compile_cache
from experiments.dial.page import result_of, tables_of, write_result
from experiments.dial.plan import KINDS, Plan
from experiments.dial.runs import outcome_of, references
from experiments.dial.starts import Note
from experiments.dial.times import Times, measure_times

TIMES_NAME = "times.json"


def run_plan(plan: Plan, out: pathlib.Path, note: Note) -> pathlib.Path:
    """Makes what is missing, prints the tables and writes the page into `out`; returns the page's path.

    The seeds come one after the other, and the page is written after every training, so that an interrupted command
    leaves whole seeds and a page about them.

    Raises:
      UserError: for a plan that does not fit the model or the texts.
      RunInterruptedError: after SIGINT or SIGTERM.
    """
    wanted = [(name, seed) for seed in plan.seeds for name in KINDS]
    with compile_cache(str(plan.run / "compiled")):
        outcomes = [*references(plan, note)]
        for number, (name, seed) in enumerate(wanted, start=1):
            note(f"{number} of {len(wanted)}")
            outcomes.append(outcome_of(plan, name, seed, note))
            result = result_of(plan, outcomes).with_times(_read_times(plan.run / TIMES_NAME))
            page = write_result(result, out)
    print_tables(tables_of(result), Console(highlight=False))
    return page


def time_plan(plan: Plan, rounds: int, patience: float, note: Note) -> None:
    """Measures seconds with the checkpoints of the first seed, for the page.

    Raises:
      UserError: if they were not trained yet.
    """
    with compile_cache(str(plan.run / "compiled")):
        found = measure_times(plan, rounds, patience, note)
    write_whole(plan.run / TIMES_NAME, json.dumps(dataclasses.asdict(found), indent=1) + "\n")


def _read_times(path: pathlib.Path) -> Times | None:
    return Times(**parse_json_object(read_text(path, "times"), str(path))) if path.exists() else None
