"""Prints the results of `data.check` as tables, and plots the lengths."""

import pathlib
from collections.abc import Sequence

import numpy as np

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.data.check import SHOWN, Shared, SplitReport, modality_counts


def split_table(reports: Sequence[SplitReport]) -> TextTable:
    """Returns a table with a row per split: how much there is, and how much a run can use."""
    rows = []
    for report in reports:
        lengths = np.array(report.lengths or [0])
        counts = modality_counts(report)
        rows.append(
            (
                report.name,
                report.split,
                f"{report.rows:,}",
                f"{report.examples:,}",
                f"{sum(report.reasons.values()):,}",
                f"{report.cut:,}",
                *(f"{counts[name]:,}" for name in counts),
                f"{report.learned:,}",
                f"{np.median(lengths):.0f}",
                f"{lengths.max()}",
            )
        )
    head = ("data", "split", "rows", "examples", "unusable", "cut", *modality_counts(reports[0]), "learned")
    return TextTable("What was read, in tokens", (*head, "median length", "longest"), tuple(rows), names=2)


def unusable_table(reports: Sequence[SplitReport]) -> TextTable | None:
    """Returns a table of the first rows that cannot be used, with reasons; None if there are none."""
    rows = [(file, row, reason) for report in reports for file, row, reason in report.unusable]
    return TextTable("Rows that cannot be used", ("file", "row", "reason"), tuple(rows), names=3) if rows else None


def reason_lines(reports: Sequence[SplitReport]) -> list[str]:
    """Returns a line per reason with the number of rows."""
    return [
        f"{report.name} {report.split}: {count} x {reason}"
        for report in reports
        for reason, count in report.reasons.most_common()
    ]


def shared_table(shared: Sequence[Shared]) -> TextTable | None:
    """Returns a table of the first examples that two splits share; None if there are none."""
    rows = [
        ("nearly" if one.near else "equal", f"{one.splits[0]}: {one.first}", f"{one.splits[1]}: {one.second}")
        for one in shared[:SHOWN]
    ]
    title = f"In two splits: {len(shared)}"
    return TextTable(title, ("how", "one", "other"), tuple(rows), names=3) if rows else None


def draw_lengths(reports: Sequence[SplitReport], max_length: int, path: pathlib.Path) -> pathlib.Path:
    """Plots a histogram of each domain's lengths, with a line at encoding.max_length.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(report.name for report in reports))
    figure = Figure(figsize=(7.0, 2.2 * len(names) + 0.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for name, axes in zip(names, figure.subplots(len(names), 1, squeeze=False)[:, 0], strict=True):
        lengths = [length for report in reports if report.name == name for length in report.lengths]
        axes.hist(lengths, bins=40, range=(0, max(max_length, max(lengths, default=1))), color="#4c72b0")
        axes.axvline(max_length, color="#c44e52", linewidth=1)
        axes.set_title(f"{name}: tokens of {len(lengths):,} sequences; the line is max_length", fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_png(str(path))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
    return path
