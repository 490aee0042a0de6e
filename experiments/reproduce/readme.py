"""Writes the main figure and the table of verdicts between the two markers of a page in docs/results."""

import os
import pathlib

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.text_table import TextTable
from experiments.reproduce.evomoe_output import evomoe_block, is_evomoe
from experiments.reproduce.output import MAIN_FIGURE, PAGE_NAME, Page, claims_of, markdown_table, old_splits
from experiments.reproduce.tables import verdict_table

BEGIN = "<!-- python -m experiments.reproduce: begin -->"
END = "<!-- python -m experiments.reproduce: end -->"
EVOMOE_BEGIN = BEGIN.replace("reproduce", "reproduce evomoe")
EVOMOE_END = END.replace("reproduce", "reproduce evomoe")


def update_readme(page: Page, folder: pathlib.Path, readme: pathlib.Path) -> None:
    """Replaces the text between the markers of `readme`, a Markdown file, with the main figure and the verdicts.

    Raises:
      UserError: if there is no such file, or it does not hold exactly one pair of markers.
    """
    try:
        text = readme.read_text()
    except OSError as error:
        raise UserError(f"cannot read {readme}: {error.strerror}") from error
    begin, end = (EVOMOE_BEGIN, EVOMOE_END) if is_evomoe(page.results) else (BEGIN, END)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{readme} must hold {begin} and then {end}, once each, on lines of their own")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{begin}\n{block(page, folder, readme.parent)}{end}{after}")


def block(page: Page, folder: pathlib.Path, base: pathlib.Path) -> str:
    """Returns the figure and the verdicts without details, with links relative to `base`."""
    where = pathlib.Path(os.path.relpath(folder, base)).as_posix()
    return "".join(f"{note}\n\n" for note in old_splits(page.results)) + _verdicts(page, where)


def _verdicts(page: Page, where: str) -> str:
    if is_evomoe(page.results):
        return evomoe_block(page, where)
    whole = verdict_table(claims_of(page.results))
    short = TextTable(whole.title, whole.columns[:4], tuple(row[:4] for row in whole.rows))
    return (
        f"![Score against realised real experts per token, dynamic and static]({where}/{MAIN_FIGURE})\n\n"
        f"{markdown_table(short)}\n\n"
        f"By domain, with tables 1 to 3 and the paper's figures beside ours: [the whole page]({where}/{PAGE_NAME}).\n"
    )
