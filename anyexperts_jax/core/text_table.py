"""Tables of text, and how to print them at any terminal width without cutting a figure."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NARROWEST = 8  # the least width of a column of wrapped text, in terminal columns


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of formatted texts. The first `names` columns label the row; the others hold figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def fold(table: TextTable, width: int) -> list[TextTable]:
    """Splits a table into blocks of columns that fit `width`; each block repeats the row labels.

    Labels may take half of the width and wrap if they are longer. A block has at least one column, which wraps if it is
    too wide by itself.
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
    """Draws the table for a terminal of `width` columns: headings wrap between words, and no text is cut.

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
    """Prints each table below its title, folded to the console's width."""
    from rich.text import Text

    for table in tables:
        console.print(Text(table.title, style="bold"))
        for block in fold(table, console.width):
            console.print(to_rich(block, console.width, lines=lines))


def _block(table: TextTable, start: int, stop: int) -> TextTable:
    """The row labels and the figures of columns `start` to `stop`."""

    def take(row: tuple[str, ...]) -> tuple[str, ...]:
        return (*row[: table.names], *row[table.names + start : table.names + stop])

    return TextTable(table.title, take(table.columns), tuple(map(take, table.rows)), table.names)


def _widths(table: TextTable) -> list[int]:
    """The width of each column: its widest text, or the widest word of its heading."""
    from rich.cells import cell_len

    cells = zip(*table.rows, strict=True) if table.rows else ((),) * len(table.columns)
    pairs = zip(table.columns, cells, strict=True)
    return [max(map(cell_len, (*heading.split(), *texts, ""))) for heading, texts in pairs]


def _frame(names: int, figures: int) -> int:
    """Terminal columns taken by padding and lines."""
    return 3 * (names + figures) + 1
