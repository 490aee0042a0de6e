"""Tables of finished texts, and how a terminal of any width shows them with every figure whole."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NARROWEST = 8  # columns of the terminal that a folded text gets at least


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of finished texts. The first `names` columns say what a row is of; the others hold figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def fold(table: TextTable, width: int) -> list[TextTable]:
    """The table as one or several that each fit `width`: blocks of its columns, each after the names of the rows.

    Names may take half of the width, and break where they are longer. A block has at least one column; one that is
    wider still breaks too.
    """
    names = min(sum(_widths(table)[: table.names]), width // 2)
    figures = _widths(table)[table.names :]
    blocks, start = [], 0
    while start < len(figures):
        stop = start + 1
        while (
            stop < len(figures)
            and names + sum(figures[start : stop + 1]) + _frame(table.names, stop - start + 1) <= width
        ):
            stop += 1
        blocks.append(_block(table, start, stop))
        start = stop
    return blocks or [table]


def to_rich(table: TextTable, width: int, *, lines: bool = False) -> "Table":
    """For a terminal of `width` columns: headings break between words, texts where they must, and nothing is cut.

    Args:
      lines: draw lines between columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    widths = _widths(table)
    names, figures = widths[: table.names], widths[table.names :]
    while sum(names) + sum(figures) + _frame(len(names), len(figures)) > width and max(names) > _NARROWEST:
        names[names.index(max(names))] -= 1
    style = box.HEAVY_HEAD if lines else box.SIMPLE_HEAD
    drawn = Table(box=style, pad_edge=lines, padding=(0, 1) if lines else (0, 1, 0, 0))
    for index, (column, own) in enumerate(zip(table.columns, [*names, *figures], strict=True)):
        drawn.add_column(Text(column), justify="left" if index < table.names else "right", width=own, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn


def print_tables(tables: Iterable[TextTable], console: "Console", *, lines: bool = False) -> None:
    """Prints each with its title above it, folded to the console's width."""
    from rich.text import Text

    for table in tables:
        console.print(Text(table.title, style="bold"))
        for block in fold(table, console.width):
            console.print(to_rich(block, console.width, lines=lines))


def _block(table: TextTable, start: int, stop: int) -> TextTable:
    """The names, and the figures from column `start` to `stop`."""

    def take(row: tuple[str, ...]) -> tuple[str, ...]:
        return (*row[: table.names], *row[table.names + start : table.names + stop])

    return TextTable(table.title, take(table.columns), tuple(map(take, table.rows)), table.names)


def _widths(table: TextTable) -> list[int]:
    """Of each column the widest text, and of its heading the widest word."""
    from rich.cells import cell_len

    cells = zip(*table.rows, strict=True) if table.rows else ((),) * len(table.columns)
    pairs = zip(table.columns, cells, strict=True)
    return [max(map(cell_len, (*heading.split(), *texts, ""))) for heading, texts in pairs]


def _frame(names: int, figures: int) -> int:
    """Columns of the terminal that padding and lines take."""
    return 3 * (names + figures) + 1
