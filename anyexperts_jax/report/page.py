"""`report`: a self-contained HTML page about a run, and its pictures as PNG files."""

import base64
import dataclasses
import importlib.resources
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from anyexperts_jax.core.errors import require
from anyexperts_jax.report.overview import overview
from anyexperts_jax.report.sections import Section, sections
from anyexperts_jax.report.source import ReportSource, gather, require_run
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_lock import run_lock

REPORT_FOLDER = "report"
PAGE_NAME = "index.html"


def report(run_dir: str | pathlib.Path, *, examples: int = 3, mesh: Mesh | None = None) -> pathlib.Path:
    """Writes RUN/report/index.html and the PNG files next to it; returns the path of the page.

    The page needs no other file. If something is missing (an evaluation, a checkpoint, records), the page says so, with
    the command that makes it.

    Args:
      examples: number of importance maps per domain, of its first test examples.
      mesh: where to put the checkpoint, whatever mesh it was trained on; None: the first device.

    Raises:
      UserError: if there is no run in `run_dir`, one of its files is not in the format of this version, or another
        process is writing its report.
    """
    root = RunDir(pathlib.Path(run_dir)).root
    require(examples >= 1, f"examples={examples} must be >= 1")
    require_run(root)
    with run_lock(root, "report"):
        source = gather(root, examples, mesh)
        fresh = root / f"{REPORT_FOLDER}.new"  # drawn completely before the existing report is replaced
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            (fresh / PAGE_NAME).write_text(render(source, sections(source, fresh)), encoding="utf-8")
            folder = root / REPORT_FOLDER
            folder.mkdir(exist_ok=True)
            for stale in folder.glob("*.png"):
                stale.unlink()
            for path in fresh.iterdir():
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder / PAGE_NAME


def render(source: ReportSource, found: Sequence[Section]) -> str:
    """The HTML of the page."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    folder = importlib.resources.files("anyexperts_jax.report")
    files = [folder / f"report.{ending}" for ending in ("html", "css", "js")]
    text, style, script = (file.read_text(encoding="utf-8") for file in files)
    filled = [
        {**{field.name: getattr(one, field.name) for field in dataclasses.fields(one)}, "pictures": _embedded(one)}
        for one in found
    ]
    for one in filled:
        one["data"] = None if one["data"] is None else markupsafe.Markup(_json(one["data"]))
    return environment.from_string(text).render(
        title=source.title,
        summary=source.summary,
        overview=overview(source),
        sections=filled,
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
    )


def _json(data: Mapping[str, Any]) -> str:
    """Returns JSON for a script element: nothing in it ends the element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _embedded(section: Section) -> list[dict[str, str]]:
    return [
        {
            "title": picture.title,
            "caption": picture.caption,
            "alt": picture.alt,
            "kind": picture.kind,
            "base64": base64.b64encode(picture.path.read_bytes()).decode(),
        }
        for picture in section.pictures
    ]
