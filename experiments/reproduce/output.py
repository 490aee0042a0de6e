"""Writes the tables and figures of experiments from their results: CSV, PNG and one Markdown page."""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from anyexperts_jax.core.quantities import count_text
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.data.domain import SPLITS_VERSION
from experiments.reproduce import tables
from experiments.reproduce.claims import BETTER_MARGIN, EQUAL_MARGIN, MIN_SEEDS, Claim, all_claims
from experiments.reproduce.collect import Results
from experiments.reproduce.curves import DYNAMIC, SALIENCE
from experiments.reproduce.figures import draw_curves, draw_separations
from experiments.reproduce.layer_times import LayerTimes
from experiments.reproduce.run_result import RunResult
from experiments.reproduce.tables import VERDICTS_TITLE

PAGE_NAME = "README.md"
MAIN_FIGURE = "figure3_realised.png"
QUICK_NOTE = "QUICK RUN: a few steps, to see that everything works. These figures say nothing about the method."
OLD_SPLITS_NOTE = (
    "**Measured on data splits that leaked; to be measured again:** {} of {} runs were made before the splits were "
    "fixed. 84 to 88% of their test questions of addition and comparison were also in train, with the operands "
    "reversed, and cuts of one font, variants of one voice and scans of one hand were in both."
)
HEADING = "AnyExperts, reproduced at a scale anyone can rerun"
NOTE = (
    "The paper trains a 16B model on web-scale data and tests it on public benchmarks; this is a model of {} "
    "parameters on generated questions about real signals. The paper's figures stand beside ours for their direction, "
    "not their size."
)
RULE = (
    f"The rule was fixed before the runs. A claim of something better is supported where the interval of the "
    f"difference lies above 0, not supported where it lies below {100 * BETTER_MARGIN:g} point (a gain of a point is "
    f"excluded), else undecided. A claim of the same score is supported where the interval lies above "
    f"-{100 * EQUAL_MARGIN:g} points, not supported where it lies below, else undecided. With fewer than {MIN_SEEDS} "
    "seeds nothing is decided. AUC is given in points above the 50 of chance. There are as many chances to be wrong as "
    "there are rows, and intervals over five seeds are a little too narrow."
)
_START_NOTE = (
    "Every variant of a seed goes on from one run of a static top-8, of {} steps, as the paper's go on from a "
    "pretrained mixture."
)
_EMPTY = Results({})


@dataclasses.dataclass(frozen=True)
class Page:
    """The contents of a page: results by the name of the table or figure, and how they were made."""

    results: Mapping[str, Results]
    command: str
    parameters: int  # of the model
    quick: bool = False
    times: LayerTimes | None = None
    start_steps: int | None = None  # of the run that a seed's runs start from; None if they train from scratch

    @property
    def title(self) -> str:
        """Returns the title of every picture."""
        return QUICK_NOTE if self.quick else f"AnyExperts at {self.size} parameters"

    @property
    def size(self) -> str:
        """Returns the number of parameters in a unit that fits it."""
        return count_text(self.parameters)


def write_page(page: Page, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes README.md, a CSV for each table and the figures into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _tables(page.results)
    paths = []
    for name, table in made.items():
        paths.append(write_csv(table, folder / f"{name}.csv", page.quick))
    pictures = _pictures(page, folder)
    shown = [*pictures, *(path for path in map_pictures(folder) if path not in pictures)]
    note = NOTE.format(page.size)
    note += f" {_START_NOTE.format(page.start_steps)}" if page.start_steps else ""
    text = page_text(page, HEADING, note, RULE, list(made.values()), [path.name for path in shown])
    text += f"{_times_text(page.times)}\n" if page.times is not None else ""
    path = folder / PAGE_NAME
    path.write_text(text)
    return [path, *paths, *pictures]


def claims_of(results: Mapping[str, Results]) -> list[Claim]:
    """Returns the claims that the results so far can judge."""
    return all_claims(results.get("figure3", _EMPTY), results.get("table3", _EMPTY))


def _tables(results: Mapping[str, Results]) -> dict[str, TextTable]:
    """Returns the tables by the name of their file."""
    makers = {
        "table1": tables.wer_table,
        "figure3": tables.curve_table,
        "table2": tables.budget_table,
        "table3": tables.ablation_table,
        "figure5": tables.separation_table,
    }
    made = {"verdicts": tables.verdict_table(claims_of(results))}
    made |= {name: maker(results[name]) for name, maker in makers.items() if name in results and results[name].found}
    return made


def _pictures(page: Page, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the figures that need only results; importance maps need a checkpoint, see `maps`."""
    paths = []
    if page.results.get("figure3", _EMPTY).found:
        results = page.results["figure3"]
        paths.append(draw_curves(results, folder / "figure3.png", page.times, page.title))
        paths.append(draw_curves(results, folder / MAIN_FIGURE, None, page.title, all_axes=False))
    if page.results.get("figure5", _EMPTY).found:
        path = folder / "figure5_auc.png"
        paths.append(draw_separations(page.results["figure5"], (DYNAMIC, SALIENCE), path, page.title))
    return paths


def map_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the importance maps in `folder`, drawn now or earlier, as not every machine has the checkpoint."""
    return [*sorted(folder.glob("figure4_*.png")), *sorted(folder.glob("figure5_*.png"))]


def page_text(
    page: Page, heading: str, note: str, rule: str, made: Sequence[TextTable], pictures: Sequence[str]
) -> str:
    """Returns a Markdown page: how the runs were made, the tables with `rule` below the verdicts, and the pictures."""
    results = [result for one in page.results.values() for result in one.found.values()]
    lines = [f"# {heading}", ""]
    lines += [f"**{QUICK_NOTE}**", ""] if page.quick else []
    lines += [line for note in old_splits(page.results) for line in (note, "")]
    lines += [f"`{page.command}`", "", note, "", how_text(results), ""]
    lines += [missing_text(page.results), ""]
    for table in made:
        lines += [f"## {table.title}", "", markdown_table(table), ""]
        lines += [rule, ""] if table.title == VERDICTS_TITLE else []
    lines += [line for name in pictures for line in (f"![{name}]({name})", "")]
    return "\n".join(lines)


def old_splits(results: Mapping[str, Results]) -> list[str]:
    """Returns a line if runs were measured on splits of another version, else none."""
    once = {one.id: one for each in results.values() for one in each.found.values()}.values()
    old = sum(one.splits != SPLITS_VERSION for one in once)
    return [OLD_SPLITS_NOTE.format(old, len(once))] if old else []


def missing_text(results: Mapping[str, Results]) -> str:
    """Tells which runs are missing, by variant and seed, how many are older, and which seeds are not all paired."""
    seeds: dict[str, set[int]] = {}
    for name, seed in (key for one in results.values() for key in one.missing):
        seeds.setdefault(name, set()).add(seed)
    names = ", ".join(f"{name} (seeds {' '.join(map(str, sorted(found)))})" for name, found in sorted(seeds.items()))
    said = f"Not run yet, and left out of what follows: {names}." if seeds else "All runs are done."
    older = {key for one in results.values() for key in one.older}
    if older:
        said += (
            f" {len(older)} of them are of an older version of the code or of its defaults: they are shown until the "
            "same command has run them again."
        )
    apart = sorted({seed for one in results.values() for seed in one.apart})
    if apart:
        said += (
            f" Runs of seeds {' '.join(map(str, apart))} went on from starts that were trained more than once, as on "
            "two machines; only those from the same one are paired."
        )
    return said


def how_text(results: Sequence[RunResult]) -> str:
    """Tells in a sentence or two how the runs were made."""
    once = {result.id: result for result in results}.values()
    devices = sorted({result.device for result in once})
    seconds = sorted(result.train_seconds + result.evaluate_seconds for result in once)
    middle = seconds[len(seconds) // 2] if seconds else 0.0
    examples = sorted({score.examples for one in once for budget in one.budgets for score in budget.scores})
    versions = sorted({", ".join(f"{name} {value}" for name, value in one.versions.items()) for one in once})
    return (
        f"{len(once)} runs on {'; '.join(devices)}, the median one took {middle:.0f} s; "
        f"{', '.join(map(str, examples))} test questions a domain and seed. {'; '.join(versions)}. "
        "Intervals are 95% bootstrap intervals of the mean over seeds; differences are paired by seed."
    )


def _times_text(times: LayerTimes) -> str:
    named = {"dynamic": times.dynamic, "static": times.static}
    points = {kind: ", ".join(f"{real:.2f}: {ms:.0f} ms" for real, ms in found) for kind, found in named.items()}
    return (
        f"Layer times: one MoE layer of size {times.shape} ({times.tokens} tokens), forward, router and importance "
        f"included, medians of interleaved rounds on {times.device}; by realised real experts, dynamic "
        f"{points['dynamic']}; static {points['static']}."
    )


def markdown_table(table: TextTable) -> str:
    """Formats the table as Markdown, with figures as they are and bars in names escaped."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (table.columns, *table.rows)]
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join((head, "|---" * len(table.columns) + "|", *body))


def write_csv(table: TextTable, path: pathlib.Path, quick: bool) -> pathlib.Path:
    """Writes the table's texts as CSV; the first line marks a quick run."""
    with path.open("w", newline="") as file:
        if quick:
            file.write(f"# {QUICK_NOTE}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    return path
