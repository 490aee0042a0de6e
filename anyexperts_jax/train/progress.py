"""A run's output: a progress bar on a terminal, plain lines elsewhere, and tables at the end."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.core.text_table import TextTable, print_tables
from anyexperts_jax.train.goodput import StepTimes, TimeReport

PLAIN_LINE_SECONDS = 15.0  # between lines if there is no terminal


class _Bar(Progress):
    """A progress bar with the status of the last step below it, which wraps on a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["status"])


class Reporter:
    """Shows a run's progress on a console."""

    def __init__(self, console: Console | None) -> None:
        """`console`: None shows nothing."""
        self._console = console or Console(quiet=True)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn())
        self._bar = _Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: Any = None
        self._later: list[str | TextTable] = []
        self._last_line = time.monotonic()

    def start(self, done: int, steps: int) -> None:
        self._task = self._bar.add_task("", total=steps, completed=done, status="")
        self._bar.start()

    def step(self, done: int, steps: int, status: str) -> None:
        """Shows that `done` of `steps` steps are taken, with a status line."""
        self._bar.update(self._task, completed=done, status=status)
        if not self._console.is_terminal and time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self.note(f"step {done}/{steps}  {status}")

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def note_later(self, line: str | TextTable) -> None:
        """Keeps a line or a table until `show_notes`, so that a run that is refused shows only the reason."""
        self._later.append(line)

    def show_notes(self) -> None:
        for line in self._later:
            if isinstance(line, TextTable):
                print_tables([line], self._console, lines=True)
            else:
                self.note(line)
        self._later = []

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        exact = "  ".join(f"{name} {scores['exact_match']:.0%}" for name, scores in record["domains"].items())
        self.note(f"step {step}: validation loss {record['loss']:.3f}, exact match: {exact}")

    def stop(self) -> None:
        self._bar.stop()

    def times(self, report: TimeReport) -> None:
        """Shows where the time went, if any step was taken."""
        if report.steps:
            print_tables([time_table(report)], self._console, lines=True)
            if report.step_times is not None:
                self.note(step_times(report.step_times))

    def tables(self, record: dict[str, Any]) -> None:
        """Shows the last evaluation: scores by domain, routing by layer and modality."""
        print_tables([domain_table(record)], self._console, lines=True)
        if len(record["real_slots"]):  # a dense model routes nothing
            print_tables([routing_table(record)], self._console, lines=True)


def status_line(scalars: dict[str, float], routing: dict[str, Any], tokens_per_second: float) -> str:
    """One line about a step, with the share of dropped slots if any. `routing` comes from `metrics.routing_means`."""
    share = routing["dropped_share"]
    dropped = f"  dropped {100 * share:.3g}% of slots" if share else ""
    told = f"loss {scalars['answer_loss']:.3f}  answer tokens right {scalars['token_accuracy']:.0%}"
    if "preference_loss" in scalars:
        told = f"loss {scalars['preference_loss']:.3f}  chosen preferred {scalars['preference_accuracy']:.0%}"
        told += f" by {scalars['reward_margin']:.3g}"
    return f"{told}  real experts {routing['mean_real_slots']:.2f}{dropped}  {tokens_per_second:,.0f} tokens/s"


def time_table(report: TimeReport) -> TextTable:
    """The seconds and share of each part of the wall time, and the goodput."""
    wall = sum(report.seconds.values())
    rows = [(name, f"{seconds:,.1f}", f"{seconds / wall:.1%}") for name, seconds in report.seconds.items()]
    title = f"Goodput {report.goodput:.1%} of {wall:,.1f} s, {report.steps} steps"
    return TextTable(title, ("part", "seconds", "share"), tuple(rows))


def step_times(times: StepTimes) -> str:
    """One line about the times of a step."""
    return f"seconds per step: median {times.median:.3g}, 95% {times.p95:.3g}, slowest {times.slowest:.3g}"


def domain_table(record: dict[str, Any]) -> TextTable:
    """One row per domain: its loss and its accuracy."""
    rows = []
    for name, scores in record["domains"].items():
        right = (f"{_number(scores[one]):.1%}" for one in ("token_accuracy", "exact_match"))
        rows.append((name, f"{_number(scores['loss']):.3f}", *right, str(scores["examples"])))
    columns = ("domain", "loss", "answer tokens right", "answers right", "examples")
    return TextTable("Validation (teacher-forced)", columns, tuple(rows))


def routing_table(record: dict[str, Any]) -> TextTable:
    """Mean real experts by layer and modality, and each layer's load and dropped slots."""
    real_LM, share_LM = np.asarray(record["real_slots"], float), np.asarray(record["virtual_share"], float)
    rows = []
    for layer, real_M in enumerate(real_LM):
        cells = ["-" if np.isnan(real) else f"{real:.2f}" for real in real_M]
        share = "-" if np.isnan(share_LM[layer]).all() else f"{np.nanmean(share_LM[layer]):.1%}"
        load = f"{_number(record['load_max_over_mean'][layer]):.2f}"
        rows.append((str(layer), *cells, share, load, f"{_number(record['dropped'][layer]):.0f}"))
    columns = ("MoE layer", *MODALITY_NAMES, "virtual share", "load max/mean", "dropped")
    realised, nominal = record["mean_real_slots"], record["nominal_real_slots"]
    return TextTable(f"Real experts per token: {realised:.2f} realised, {nominal:.2f} nominal", columns, tuple(rows))


def _number(value: float | None) -> float:
    """Converts null to NaN: JSON has no NaN, so undefined figures are null there."""
    return float("nan") if value is None else value
