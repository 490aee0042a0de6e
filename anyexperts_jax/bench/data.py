"""Measures how fast examples are read and encoded, by domain and modality, compared with a plain library's loop."""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.bench.output import environment, markdown, write_files
from anyexperts_jax.bench.plain_loops import plain_loop
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Conversation, Document, Item, Text
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.sequence import EncodedSequence, padded
from anyexperts_jax.data.source import Source
from anyexperts_jax.data.turns import chat_template, encode_item
from anyexperts_jax.tokenizers.store import open_tokenizer

SPLIT = "train"
WANTED = 0.7  # target, as a share of the plain loop's speed


@dataclasses.dataclass(frozen=True)
class DataSpeed:
    """Speeds for one domain and modality, per second of processor time: those of one busy core."""

    domain: str
    modality: str  # text, image, audio or video; for conversations all they contain, as "audio+image"
    examples: int
    examples_per_second: float  # read, decoded, encoded and padded, as training needs them
    tokens_per_second: float  # positions of the sequences, without padding
    megabytes_per_second: float  # of text in UTF-8, pixels, and samples of 16 bits
    same_per_second: float  # examples only read, decoded and tokenised, which is all that the plain loop does
    plain: str | None  # the libraries of the plain loop; None: there is no such loop
    plain_per_second: float | None
    same_ratio: float | None  # speed over the plain loop's, for the same work
    ratio: float | None  # speed over the plain loop's, for all that training needs


@dataclasses.dataclass(frozen=True)
class DataBench:
    environment: dict[str, Any]
    speeds: tuple[DataSpeed, ...]


def bench_data(
    config: DataConfig, examples: int = 200, rounds: int = 5, note: Callable[[str], None] = lambda line: None
) -> DataBench:
    """Times the first `examples` train examples of each domain, in `rounds` interleaved rounds.

    Raises:
      UserError: if a number is out of range, or a domain cannot be read.
    """
    require(examples >= 1, f"examples={examples} must be >= 1")
    require(rounds >= 1, f"rounds={rounds} must be >= 1")
    made_with, sources = environment(rounds), Sources(config)
    speeds: list[DataSpeed] = []
    for name in config.domains:
        count = sources.count(name, SPLIT, examples)
        source = sources.open(name, SPLIT, count if name not in config.places() else None)
        note(f"{name}: {count} examples")
        read = [source[index] for index in range(count)]
        for modality in dict.fromkeys(_modality(example) for example in read):
            chosen = {index: example for index, example in enumerate(read) if _modality(example) == modality}
            speeds.append(_speed(config, name, source, chosen, rounds))
    return DataBench(made_with, tuple(speeds))


def _modality(item: Item) -> str:
    """Returns an example's medium, a conversation's kinds of media ("audio+image"), or "text"."""
    if isinstance(item, Example):
        return item.media or "text"
    if isinstance(item, Document):
        return "text"
    return "+".join(sorted({medium.kind for medium in item.media()})) or "text"


def _amounts(items: Sequence[Item], encode: Callable[[Item], EncodedSequence]) -> tuple[int, float]:
    """Returns the positions and the megabytes of the items."""
    return sum(encode(item).size.positions for item in items), sum(_bytes(item) for item in items) / 1e6


def texts_of(item: Item) -> list[str]:
    """Returns all texts of an item, in order."""
    if isinstance(item, Document):
        return [item.text]
    if isinstance(item, Conversation):
        return [part.text for message in item.messages for part in message.parts if isinstance(part, Text)]
    return [item.question, item.answer]


def _bytes(item: Item) -> int:
    media: list[tuple[str, np.ndarray]] = []
    if isinstance(item, Conversation):
        media = [(one.kind, one.values) for one in item.media()]
    elif isinstance(item, Example):
        own = {"image": item.image, "video": item.video, "audio": item.audio}
        media = [(kind, values) for kind, values in own.items() if values is not None]
    # A sound is counted as the 16-bit samples that files hold, not as the float32 it is decoded to.
    sizes = [2 * len(values) if kind == "audio" else values.nbytes for kind, values in media]
    return sum(len(text.encode()) for text in texts_of(item)) + sum(sizes)


def _speed(config: DataConfig, name: str, source: Source, examples: Mapping[int, Item], rounds: int) -> DataSpeed:
    """Measures the speed for examples of one modality, given by their indices."""
    spec, tokenizer, indices = config.encoding, open_tokenizer(config.tokenizer), list(examples)
    template = chat_template(config, tokenizer)
    encode = functools.partial(encode_item, spec=spec, tokenizer=tokenizer, template=template)

    def same() -> None:
        for index in indices:
            for text in texts_of(source[index]):
                tokenizer.encode(text)

    def whole() -> None:
        for index in indices:
            padded(encode(source[index]), spec)

    calls: dict[str, Callable[[], None]] = {"whole": whole, "same": same}
    plain = plain_loop(config, name, SPLIT, source)
    if plain is not None:
        _, loop = plain
        calls["plain"] = lambda: loop(indices)
    seconds = _time_interleaved(calls, rounds)
    per_second = {call: len(indices) / statistics.median(each) for call, each in seconds.items()}
    tokens, megabytes = _amounts(list(examples.values()), encode)
    return DataSpeed(
        domain=name,
        modality=_modality(next(iter(examples.values()))),
        examples=len(indices),
        examples_per_second=per_second["whole"],
        tokens_per_second=per_second["whole"] * tokens / len(indices),
        megabytes_per_second=per_second["whole"] * megabytes / len(indices),
        same_per_second=per_second["same"],
        plain=None if plain is None else plain[0],
        plain_per_second=per_second.get("plain"),
        same_ratio=_ratio(seconds, "same"),
        ratio=_ratio(seconds, "whole"),
    )


def _time_interleaved(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Returns the processor seconds of each call in each round (A B A B), after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number > 0:
                seconds[name].append(max(time.process_time() - start, 1e-9))
    return seconds


def _ratio(seconds: dict[str, list[float]], name: str) -> float | None:
    """Returns the median over rounds of the speed relative to the plain loop's in the same round."""
    if "plain" not in seconds:
        return None
    return statistics.median(plain / own for own, plain in zip(seconds[name], seconds["plain"], strict=True))


def data_tables(bench: DataBench) -> tuple[TextTable, TextTable]:
    """Returns two tables: the speeds, and their comparison with the plain loops."""
    speeds = [
        (
            one.domain,
            one.modality,
            f"{one.examples}",
            f"{one.examples_per_second:.0f}",
            f"{one.tokens_per_second:.0f}",
            f"{one.megabytes_per_second:.2f}",
        )
        for one in bench.speeds
    ]
    plain = [
        (
            one.domain,
            one.modality,
            f"{one.same_per_second:.0f}",
            "-" if one.plain_per_second is None else f"{one.plain_per_second:.0f}",
            "-" if one.same_ratio is None else f"{one.same_ratio:.2f}",
            "-" if one.ratio is None else f"{one.ratio:.2f}",
            one.plain or "generated",
        )
        for one in bench.speeds
    ]
    title = "Examples as training takes them, a second of one core"
    columns = ("domain", "modality", "examples", "examples/s", "tokens/s", "MB/s")
    beside = f"Beside the plain library, examples a second (wanted: {WANTED} of it)"
    others = ("domain", "modality", "the same work", "plain", "same over plain", "all over plain", "plain loop")
    return TextTable(title, columns, tuple(speeds), names=2), TextTable(beside, others, tuple(plain), names=2)


def write_bench(bench: DataBench, folder: pathlib.Path, command: str) -> tuple[pathlib.Path, ...]:
    """Writes bench_data.json, .csv and .md to `folder` and returns their paths."""
    text = markdown("Data", command, bench.environment, data_tables(bench))
    return write_files(folder, "bench_data", command, bench, rows=bench.speeds, text=text)
