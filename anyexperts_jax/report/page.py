"""`report`: one self-contained HTML page about a run, and its pictures as PNG files."""

import base64
import dataclasses
import importlib.resources
import pathlib
from collections.abc import Sequence

from anyexperts_jax.report.sections import Section, sections
from anyexperts_jax.report.source import ReportSource, gather

REPORT_FOLDER = "report"
PAGE_NAME = "index.html"


def report(run_dir: str | pathlib.Path, *, examples: int = 3) -> pathlib.Path:
    """Writes RUN/report/index.html and the PNG files beside it; returns the page's path.

    The page needs no other file. What a run does not have yet (an evaluation, a checkpoint, records) is named on the
    page with the command that makes it.

    Args:
      examples: of each domain's test split, the first ones, to draw importance on.

    Raises:
      UserError: when there is no run in `run_dir`, or one of its files is not what this version writes.
    """
    source = gather(pathlib.Path(run_dir), examples)
    folder = pathlib.Path(run_dir) / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    page = folder / PAGE_NAME
    page.write_text(render(source, sections(source, folder)))
    return page


def render(source: ReportSource, found: Sequence[Section]) -> str:
    """The page's HTML."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = (importlib.resources.files("anyexperts_jax.report") / "report.html").read_text()
    filled = [
        {**{field.name: getattr(one, field.name) for field in dataclasses.fields(one)}, "pictures": _embedded(one)}
        for one in found
    ]
    return environment.from_string(text).render(title=source.title, summary=source.summary, sections=filled)


def _embedded(section: Section) -> list[dict[str, str]]:
    return [
        {
            "title": picture.title,
            "caption": picture.caption,
            "base64": base64.b64encode(picture.path.read_bytes()).decode(),
        }
        for picture in section.pictures
    ]
