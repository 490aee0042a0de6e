import io

import numpy as np
import pytest
from rich.console import Console

from anyexperts_jax.core.text_table import TextTable, fold, print_tables

LETTERS = np.array(list("abcdefghijklmnop-_/[]. "))


def random_table(rng) -> TextTable:
    """One or two label columns and up to 12 columns of figures, with headings and labels of any length."""

    def words(most):
        return "".join(rng.choice(LETTERS, rng.integers(1, most))).strip() or "x"

    def figure():
        return f"{rng.integers(10 ** rng.integers(1, 9)):,} ±{rng.random():.2f}"[: rng.integers(3, 18)].strip()

    names, figures = rng.integers(1, 3), rng.integers(1, 13)
    heads = tuple(words(30) for _ in range(names + figures))
    rows = tuple((*(words(60) for _ in range(names)), *(figure() for _ in range(figures))) for _ in range(3))
    return TextTable(words(150), heads, rows, int(names))


def shown(table, width=80, **how) -> str:
    out = io.StringIO()
    print_tables([table], Console(file=out, width=width, color_system=None), **how)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("lines", [False, True])
def test_no_figure_is_cut_and_no_line_is_too_long(lines, width):
    rng = np.random.default_rng(width)
    for _ in range(30):
        table = random_table(rng)
        text = shown(table, width, lines=lines)
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())
        for row in table.rows:
            assert all(figure in text for figure in row[table.names :]), "figures stay in one piece"


def test_columns_that_do_not_fit_come_below_with_their_names():
    table = TextTable("A title", ("domain", "metric", *(f"budget {n}" for n in range(6))), (
        ("general", "exact match", *(f"{n}0.0 ±12.0" for n in range(6))),
        ("speech", "1 - WER", *(f"{n}5.0 ±12.0" for n in range(6))),
    ), names=2)  # fmt: skip
    first, second = fold(table, 80)
    assert first.columns == ("domain", "metric", "budget 0", "budget 1", "budget 2", "budget 3")
    assert second.columns == ("domain", "metric", "budget 4", "budget 5")
    assert second.rows == (
        ("general", "exact match", "40.0 ±12.0", "50.0 ±12.0"),
        ("speech", "1 - WER", "45.0 ±12.0", "55.0 ±12.0"),
    )
    assert fold(table, 200) == [table]
    assert shown(table).count("A title") == 1


def test_markup_is_text():
    table = TextTable("[/red]", ("[bold]", "[/]"), (("[/red]", "[1]"),))
    text = shown(table)
    assert text.count("[/red]") == 2
    assert all(word in text for word in ("[bold]", "[/]", "[1]"))


@pytest.mark.parametrize("rows", [(), (("a", "1"),)])
def test_a_table_without_rows_or_figures_is_shown(rows):
    assert "head" in shown(TextTable("t", ("head", "n"), rows))
    assert "only" in shown(TextTable("t", ("only",), (("a",),)))
