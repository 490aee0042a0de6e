"""Writes benchmark results to JSON, CSV and Markdown files."""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import device_text, versions


def environment(rounds: int) -> dict[str, Any]:
    """The environment that a run's figures depend on. Call it before the run: it includes the load of other
    processes."""
    return {
        "versions": versions(),
        "device": device_text(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "rounds": rounds,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),  # large pages (see __main__), for all sides of a comparison
    }


def markdown(title: str, command: str, environment: dict[str, Any], tables: Sequence[TextTable]) -> str:
    """The tables in Markdown, with the command and the machine that produced them."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"`{command}`",
        "",
        f"{environment['cores']} CPU cores, {environment['device']}; {packages}. Load average before the run: "
        f"{environment['load_before']:.1f}. Medians of {environment['rounds']} interleaved rounds."
        + (f" Expert ops: {environment['implementation']}." if "implementation" in environment else "")
        + (f" GLIBC_TUNABLES={environment['malloc']}." if environment["malloc"] else ""),
    ]
    for table in tables:
        head, *body = ("| " + " | ".join(row) + " |" for row in (table.columns, *table.rows))
        lines += ["", f"## {table.title}", "", head, "|---" * len(table.columns) + "|", *body]
    return "\n".join(lines) + "\n"


def write_files(
    folder: pathlib.Path, name: str, command: str, bench: Any, rows: Sequence[Any], text: str
) -> tuple[pathlib.Path, ...]:
    """Writes NAME.json (all of `bench`), NAME.csv (`rows`, dataclasses of one kind) and NAME.md; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, csv_path, markdown_path = (folder / f"{name}.{ending}" for ending in ("json", "csv", "md"))
    json_path.write_text(json.dumps({"command": command, **dataclasses.asdict(bench)}, indent=1) + "\n")
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    markdown_path.write_text(text)
    return json_path, csv_path, markdown_path
