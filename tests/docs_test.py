"""Every block of code in README and docs/ states whether it runs, and those that run work.

A comment above a block marks it:

    <!-- run: quick -->             runs in every test run
    <!-- run: slow -->              runs with `pytest --docs-slow` (`make test-docs` does so on the installed wheel)
    <!-- run: no, REASON -->        is never run
    <!-- run: file NAME -->         is written into a file that the page's later blocks use
    <!-- run: quick; A => B -->     runs with B in the place of A: smaller sizes

The blocks of a page run in order, in one folder outside the checkout, and Python blocks share their names. Commands
that train a model or ask one take minutes in sum: with --docs-slow they run, on copies of one smallest run where the
page trains none. Otherwise the real parser and the real configuration read them as they are written; in CI
`make demo-smoke` trains, evaluates and reports.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from anyexperts_jax.cli import main as cli
from anyexperts_jax.evolution.config import load_evolve_config
from anyexperts_jax.train.config import load_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- run: ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = {"bash", "python"}
MODEL_COMMANDS = ("train", "evolve", "evaluate", "report", "generate", "serve", "bench", "compile")
SMALLEST = ("--set", "train.steps=1", "--set", "optim.warmup_steps=0", "--set", "train.eval_examples=1")


@dataclasses.dataclass(frozen=True)
class Block:
    language: str
    written: str
    kind: str  # quick, slow, no or file
    detail: str  # the reason, or the file's name
    changes: tuple[tuple[str, str], ...]
    line: int

    @property
    def text(self):
        """Returns the block's text with its replacements made."""
        text = self.written
        for old, new in self.changes:
            assert old in text, f"line {self.line}: {old!r} is not in the block; its mark would replace it"
            text = text.replace(old, new)
        return text


def blocks(page):
    """Returns the blocks of a page, in order."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        mark, language, written = found.groups()
        first, *changes = (mark or "").split(";")
        kind, _, detail = first.replace(",", " ", 1).partition(" ")
        pairs = tuple(tuple(part.strip() for part in change.split("=>")) for change in changes)
        yield Block(language, written, kind.strip(), detail.strip(), pairs, text[: found.start(3)].count("\n"))


def page_name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_states_whether_it_runs(page):
    for block in blocks(page):
        assert block.language, f"line {block.line}: name the block's language; `text` is what nobody runs"
        if block.language in RUNNABLE:
            assert block.kind in ("quick", "slow", "no", "file"), f"line {block.line}: put <!-- run: ... --> above it"
        assert block.text  # every change finds what it replaces
        assert block.kind not in ("no", "file") or block.detail, f"line {block.line}: say why, or the file's name"


def linked(page):
    """Returns the pages of Markdown that a page links to."""
    found = re.findall(r"\]\(([^)\s#]+\.md)(?:#[^)\s]*)?\)", page.read_text())
    return {(page.parent / link).resolve() for link in found if "://" not in link}


def test_every_page_is_two_clicks_from_the_readme():
    near = linked(ROOT / "README.md")
    reached = near.union(*map(linked, near))
    assert not [page_name(page) for page in PAGES[1:] if page not in reached]


def test_every_result_is_linked_from_the_table_of_experiments():
    """Figures that no page leads to go stale: a page said "to be run" of what had been run."""
    linked_to = re.findall(r"\]\((results/[^)#]+)", (ROOT / "experiments/README.md").read_text())
    leads = {pathlib.PurePath(link).parts[1].partition(".")[0] for link in linked_to}
    made = {path.name.partition(".")[0] for path in (ROOT / "experiments/results").iterdir()}
    assert made <= leads


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.fixture(scope="session")
def smallest_run(tmp_path_factory):
    """Trains one smallest run, which all pages use."""
    run = tmp_path_factory.mktemp("docs") / "run"
    assert cli.main(["train", "smoke", "--run", str(run), *SMALLEST]) == 0
    return run


@pytest.fixture
def shell(tmp_path):
    """Returns a function that runs shell commands; `anyexperts` and `python` are the ones under test."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, module in {"anyexperts": "-m anyexperts_jax", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        (tools / name).chmod(0o755)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # `make test-docs` has the wheel there
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return lambda line: subprocess.run(["bash", "-ec", line], env=environment, check=True)


def lines_of(text):
    """Returns the commands of a block; one that continues over several lines is joined."""
    joined = text.replace("\\\n", " ")
    return [line for line in map(str.strip, joined.splitlines()) if line and not line.startswith("#")]


def needs_a_shell(line):
    return not line.startswith("anyexperts ") or any(sign in line for sign in ("|", ">", "&&", "--version"))


def read_only(words):
    """Parses a command and loads the configuration it names, without running it."""
    options = cli._parser().parse_args(words)
    if words[0] == "train":
        load_config(options.config, options.set, options.plugin)
    elif words[0] == "evolve":
        load_evolve_config(options.config, options.set)


def run_line(line, slow, shell):
    if needs_a_shell(line):
        shell(line)
        return
    words = shlex.split(line, comments=True)[1:]
    if words[0] in MODEL_COMMANDS and not slow:
        read_only(words)
    else:
        assert cli.main(words) == 0, line


RUNNING = [page for page in PAGES if any(block.kind in ("quick", "slow") for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNING, ids=page_name)
def test_blocks_run(page, shell, tmp_path, monkeypatch, request):
    slow = request.config.getoption("docs_slow")
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    trains = any("--run runs/mine" in block.written for block in blocks(page) if block.kind in ("quick", "slow"))
    if slow and not trains:
        shutil.copytree(request.getfixturevalue("smallest_run"), folder / "runs" / "mine")
    names = {"__name__": page.stem}
    for block in blocks(page):
        if block.kind == "file":
            (folder / block.detail).write_text(block.text)
        elif block.language == "python" and (block.kind == "quick" or (block.kind == "slow" and slow)):
            with contextlib.redirect_stdout(None):
                exec(compile(block.text, f"{page_name(page)}, line {block.line}", "exec"), names)
        elif block.kind == "quick" or (block.kind == "slow" and slow):
            for line in lines_of(block.text if slow else block.written):
                run_line(line, slow, shell)
        elif block.kind == "slow":
            for line in lines_of(block.written):
                if not needs_a_shell(line):
                    cli._parser().parse_args(shlex.split(line, comments=True)[1:])
