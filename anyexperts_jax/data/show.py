"""`anyexperts data show`: prints examples as a table and writes them as pictures and sound."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.names import file_name
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Item
from anyexperts_jax.data.domain import domain
from anyexperts_jax.data.drawings import Numbered, draw_sheet
from anyexperts_jax.data.example import LEVELS, Example
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.show_turns import show_items
from anyexperts_jax.data.source import Source
from anyexperts_jax.data.sources.rows import RowError
from anyexperts_jax.data.wav_file import write_wav

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MAX_COUNT = 96  # largest number of examples on a contact sheet


def show(
    domain_name: str,
    split: str,
    count: int,
    out_dir: pathlib.Path,
    *,
    start: int = 0,
    seed: int = 0,
    levels: Sequence[int] = LEVELS,
    console: "Console | None" = None,
) -> list[pathlib.Path]:
    """Shows examples `start` to `start + count` of a domain; see `show_examples`.

    Raises:
      UserError: if an argument is out of range, or `out_dir` cannot be written.
    """
    require(1 <= count <= MAX_COUNT, f"count={count} must be in [1, {MAX_COUNT}]")
    require(start >= 0, f"start={start} must be >= 0")
    source = domain(domain_name)
    examples = [(i, source.example(split, i, seed, levels)) for i in range(start, start + count)]
    return show_examples(examples, f"{domain_name}_{split}", out_dir, console=console)


def show_domain(
    config: DataConfig,
    name: str,
    split: str,
    count: int,
    out_dir: pathlib.Path,
    *,
    start: int = 0,
    sources: Sources | None = None,
    console: "Console | None" = None,
) -> list[pathlib.Path]:
    """Shows examples `start` to `start + count` of a mixture's domain; see `show_examples`.

    If a folder has fewer examples, a line says so.

    Args:
      sources: opened sources of `config`; None: open them.

    Raises:
      UserError: if an argument is out of range, the domain cannot be read, or `out_dir` cannot be written.
    """
    from rich.console import Console

    require(1 <= count <= MAX_COUNT, f"count={count} must be in [1, {MAX_COUNT}]")
    require(start >= 0, f"start={start} must be >= 0")
    console = console or Console()
    in_folder = name in config.folder_paths()
    source = (sources or Sources(config)).open(name, split, None if in_folder else start + count)
    require(start < len(source), f"start={start}: {name} has {len(source)} {split} examples, counted from 0")
    numbers = range(start, min(start + count, len(source)))
    if len(numbers) < count:
        line = f"{name} has {len(source)} {split} examples; {len(numbers)} are shown"
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
    items = [(i, _shown_item(source, i)) for i in numbers]
    examples = [(i, item) for i, item in items if isinstance(item, Example)]
    others = [(i, item) for i, item in items if not isinstance(item, Example)]
    written = show_items(others, config, f"{name}_{split}", out_dir, console) if others else []
    return written + (show_examples(examples, f"{name}_{split}", out_dir, console=console) if examples else [])


def _shown_item(source: Source, index: int) -> Item | UserError:
    """Returns an example, or the error that makes its row unusable, so that the others can still be shown."""
    try:
        return source[index]
    except RowError as error:
        return error


def show_examples(
    examples: Sequence[Numbered], name: str, out_dir: pathlib.Path, *, console: "Console | None" = None
) -> list[pathlib.Path]:
    """Prints a table of `examples` and writes, under `out_dir`, contact sheets (NAME.png) and sound (NAME_INDEX.wav).

    With several kinds of media there is a sheet for each, NAME_KIND.png. Characters of NAME that file systems do not
    accept are replaced by `core.names.file_name`. Returns the files.

    Raises:
      UserError: if there is nothing to show, or `out_dir` cannot be written.
    """
    from rich.console import Console

    require(len(examples) > 0, "there are no examples to show")
    console = console or Console()
    console.print(_table(examples, name))
    kinds = sorted({example.media or "text" for _, example in examples})
    written, safe = [], file_name(name)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            suffix = "" if len(kinds) == 1 else f"_{kind}"
            path = out_dir / f"{safe}{suffix}.png"
            draw_sheet([pair for pair in examples if (pair[1].media or "text") == kind], f"{name}{suffix}", path)
            written.append(path)
        for number, example in examples:
            if example.audio is not None:
                path = out_dir / f"{safe}_{number}.wav"
                write_wav(path, example.audio)
                written.append(path)
    except OSError as error:
        raise UserError(f"cannot write to {out_dir}: {error}") from error
    console.print(_summary(written), highlight=False, markup=False, emoji=False, soft_wrap=True)
    return written


def describe_evidence(example: Example) -> str:
    """Describes the evidence in the media: "5% of image", "frames 4-7", "0.19-0.42 s"; "" if there is none."""
    if example.image_evidence is not None:
        return f"{example.image_evidence.mean():.0%} of image"
    if example.video_evidence is not None:
        frames = np.flatnonzero(example.video_evidence.any(axis=(1, 2)))
        runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1)
        return "frames " + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs if len(run))
    joined: list[tuple[float, float]] = []
    for start, end in example.audio_evidence:
        if joined and start <= joined[-1][1]:
            start = joined.pop()[0]
        joined.append((start, end))
    return ", ".join(f"{start:.2f}-{end:.2f} s" for start, end in joined)


def _table(examples: Sequence[Numbered], name: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(name), title_justify="left", caption="underlined: evidence in the question")
    table.add_column("#", justify="right", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("level", overflow="fold")
    table.add_column("question", ratio=2, overflow="fold")
    table.add_column("answer", overflow="fold")
    table.add_column("evidence", overflow="fold")
    table.add_column("source", ratio=1, overflow="fold")
    for number, example in examples:
        cells = (
            str(number),
            Text(example.question_type),  # not interpreted as markup
            str(example.level),
            _question(example),
            Text(example.answer),
            describe_evidence(example),
            Text(example.source),
        )
        table.add_row(*cells)
    return table


def _question(example: Example) -> "Text":
    from rich.text import Text

    text = Text(example.question)
    for start, end in example.question_evidence:
        text.stylize("bold underline", start, end)
    return text


def _summary(written: Sequence[pathlib.Path]) -> str:
    pictures = [str(path) for path in written if path.suffix == ".png"]
    sounds = len(written) - len(pictures)
    return f"wrote {', '.join(pictures)}" + (f" and {sounds} WAV files beside it" if sounds else "")
