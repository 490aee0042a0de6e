"""What MkDocs needs beside the pages: reference pages made from the code, and the repository's files they link to.

A page in docs/ is plain Markdown whose links work on GitHub. When the site is built, a link that leaves docs/ is
followed: the file becomes a page of the site under `repository/` (Markdown as it is, source as a listing) or an asset
(pictures, tables). A comment `<!-- generated: NAME -->` is replaced by what NAME makes from the code.
"""

import argparse
import dataclasses
import importlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```[ ]*$|<!-- generated: [a-z ]+ -->)", re.MULTILINE | re.DOTALL)
SOURCE_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".sbatch": "bash"}


def on_files(files: Files, config: Any) -> Files:
    """Adds every file of the repository that a page links to, and those that such a file links to."""
    waiting = [page for file in files.documentation_pages() if (page := DOCS / file.src_uri).exists()]
    seen = set(waiting)
    while waiting:
        for target in linked(waiting.pop()):
            if target not in seen and DOCS not in target.parents:
                seen.add(target)
                files.append(site_file(target, config))
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replaces the generated parts, and points links out of docs/ to where the site has the file."""
    here = DOCS / page.file.src_uri
    if page.file.src_uri.startswith("repository/"):
        here = ROOT / page.file.src_uri.removeprefix("repository/")
        if not here.exists():  # a listing made by `site_file`
            return markdown

    def moved(match: re.Match[str]) -> str:
        target = resolve(here, match[2])
        if target is None:
            return match[0]
        where = os.path.relpath(site_uri(target), pathlib.PurePosixPath(page.file.src_uri).parent)
        return f"{match[1]}{pathlib.PurePath(where).as_posix()}{match[3] or ''}{match[4]}"

    parts = FENCE.split(markdown)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = LINK.sub(moved, part)
        elif part.startswith("<!-- generated: "):
            parts[index] = GENERATED[part.removeprefix("<!-- generated: ").removesuffix(" -->")]()
    return "".join(parts)


def linked(page: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files that a page's links lead to, those in code left out."""
    for part in FENCE.split(page.read_text(encoding="utf-8"))[::2]:
        for match in LINK.finditer(part):
            target = resolve(page, match[2])
            if target is not None:
                yield target


def resolve(page: pathlib.Path, link: str) -> pathlib.Path | None:
    """The file that a relative link of a page means; a folder's README where it has one. None: another site's."""
    if "://" in link or link.startswith("mailto:"):
        return None
    target = (page.parent / link).resolve()
    readme = target / "README.md"
    return readme if readme.exists() else target if target.exists() else None


def site_uri(target: pathlib.Path) -> str:
    """Where the site has a file of the repository."""
    if DOCS in target.parents:
        return target.relative_to(DOCS).as_posix()
    path = f"repository/{target.relative_to(ROOT).as_posix()}"
    is_listing = target.is_dir() or target.suffix in SOURCE_LANGUAGES or not target.suffix
    return f"{path}.md" if is_listing else path


def site_file(target: pathlib.Path, config: Any) -> File:
    """The site's copy of a file: itself, a listing of source, or a list of a folder's files."""
    uri, name = site_uri(target), target.relative_to(ROOT).as_posix()
    if target.is_dir():
        names = "\n".join(f"- `{path.name}`" for path in sorted(target.iterdir()) if path.name[0] not in "._")
        return File.generated(config, uri, content=f"# {name}\n\nFiles of this folder:\n\n{names}\n")
    if uri.endswith(".md") and target.suffix != ".md":
        language = SOURCE_LANGUAGES.get(target.suffix, "text")
        text = target.read_text(encoding="utf-8")
        return File.generated(config, uri, content=f"# {name}\n\n````{language}\n{text}\n````\n")
    return File.generated(config, uri, abs_src_path=str(target))


def api_page() -> str:
    """Every public name, by the layer that defines it."""
    import anyexperts_jax
    from anyexperts_jax.core.registry import Registry

    by_layer: dict[str, list[str]] = {}
    for name, home in anyexperts_jax._HOMES.items():
        by_layer.setdefault(home.partition(".")[0], []).append(name)
    lines = []
    for layer, names in by_layer.items():
        lines += [f"## {layer}", ""]
        for name in names:
            value, home = getattr(anyexperts_jax, name), anyexperts_jax._HOMES[name]
            if isinstance(value, Registry):
                built_in = ", ".join(f"`{entry}`" for entry in value.names())
                lines += [f"### {name}", "", f"The registry of each {value.kind}. Built in: {built_in}.", ""]
            else:
                module = f"anyexperts_jax.{home}"
                defined = getattr(value, "__module__", module)  # a name that another module only passes on
                lines += [f"::: {defined if hasattr(importlib.import_module(defined), name) else module}.{name}", ""]
                lines += field_table(value) if dataclasses.is_dataclass(value) else []
    return "\n".join(lines)


def field_table(cls: Any) -> list[str]:
    """The fields of a dataclass that have a meaning in its source."""
    from anyexperts_jax.core.field_docs import field_docs

    docs = field_docs(cls)
    rows = [f"| `{field.name}` | {cell(docs[field.name])} |" for field in dataclasses.fields(cls) if field.name in docs]
    return ["| field | meaning |\n|---|---|", *rows, ""] if rows else []


def cell(text: str) -> str:
    """Text as a cell of a Markdown table takes it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def configuration_page() -> str:
    """Every key of a run's configuration and of EvoMoE's, from the dataclasses."""
    from anyexperts_jax.evolution.config import EvolveConfig
    from anyexperts_jax.train.config import RunConfig
    from anyexperts_jax.train.reference import Table, describe, toml_value

    def section(table: Table) -> Iterator[str]:
        if table.keys:
            yield f"## {table.name or 'Top of the file'}\n"
            if table.meaning:
                yield f"{table.meaning}.{' The whole table may be `none`.' if table.optional else ''}\n"
            yield "| key | type | default | meaning |\n|---|---|---|---|"
            for key in table.keys:
                cells = (f"`{key.name}`", key.type, f"`{toml_value(key.default)}`", key.meaning)
                yield "| " + " | ".join(map(cell, cells)) + " |"
            yield ""
        for inside in table.tables:
            yield from section(inside)

    return "\n".join([*section(describe(RunConfig())), *section(describe(EvolveConfig(), "evolve"))])


def command_line_page() -> str:
    """Every command with its options, from the parsers."""
    from anyexperts_jax.cli import main

    def section(parser: argparse.ArgumentParser) -> Iterator[str]:
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if inner:
            for below in inner[0].choices.values():
                yield from section(below)
            return
        formatter = parser._get_formatter()
        yield f"## {parser.prog}\n\n{parser.description}\n\n```text\n{parser.format_usage().strip()}\n```\n"
        yield "| argument | meaning |\n|---|---|"
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
                yield f"| `{name}` | {cell(formatter._expand_help(action))} |"
        yield f"\n```text\n{parser.epilog}\n```\n"

    os.environ["COLUMNS"] = "100"  # the width of usage lines, the same wherever the site is built
    return "\n".join(section(main._parser()))


GENERATED: dict[str, Callable[[], str]] = {
    "api": api_page,
    "configuration": configuration_page,
    "command line": command_line_page,
}
