"""Converts a user's recordings and transcripts into a folder that `anyexperts` reads, split by speaker.

    python -m experiments.recordings.spoken_digits spoken_digits.tar.gz runs/spoken

The archive holds WAV files and `transcripts.tsv`: file, text, speaker. It is the spoken digits of docs/guides/
recordings.md, or any other of that form; it is named on the command line, and nothing of it is in this repository.
"""

import argparse
import csv
import dataclasses
import io
import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np
import soxr

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.data.array_records import export_array_record
from anyexperts_jax.data.decode import decode_audio
from anyexperts_jax.data.domain import Metric
from anyexperts_jax.data.example import SAMPLE_RATE, Example

TRANSCRIPTS = "transcripts.tsv"
QUESTION = "What is said?"


@dataclasses.dataclass(frozen=True)
class Recording:
    where: str  # the file's path in the archive
    sound: bytes
    text: str
    speaker: str
    speed: float = 1.0  # of playing; it also moves pitch and formants, as if another person spoke


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Recordings as a `data.source.Source`, scored by word errors."""

    items: tuple[Recording, ...]
    question_types: tuple[str, ...] = ("transcribe",)
    metric: Metric = "wer"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        one = self.items[index]
        return Example(
            domain="spoken",
            question_type=self.question_types[0],
            level=1,
            question=QUESTION,
            answer=one.text,
            source=f"speaker:{one.speaker}",
            audio=_at_speed(decode_audio(one.sound, one.where), one.speed),
        )


def _at_speed(audio: np.ndarray, speed: float) -> np.ndarray:
    """Returns the samples played at a speed, which also makes them a little quieter or louder."""
    if speed == 1:
        return audio
    loudness = 0.4 + 0.6 * (7 * speed % 1)
    return (loudness * soxr.resample(audio, speed * SAMPLE_RATE, SAMPLE_RATE)).clip(-1, 1).astype(np.float32)


def read_archive(archive: pathlib.Path) -> tuple[Recording, ...]:
    """Returns every recording that the archive's transcripts name, in order."""
    try:
        with tarfile.open(archive) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"cannot read {archive}: {error}") from error
    tables = [name for name in files if pathlib.PurePosixPath(name).name == TRANSCRIPTS]
    require(len(tables) == 1, f"{archive} holds {len(tables)} files {TRANSCRIPTS}; it must hold one")
    folder = pathlib.PurePosixPath(tables[0]).parent
    rows = csv.DictReader(io.StringIO(files[tables[0]].decode()), delimiter="\t")
    return tuple(
        Recording(str(folder / row["file"]), files[str(folder / row["file"])], row["text"], row["speaker"])
        for row in rows
    )


def convert(
    archive: pathlib.Path, folder: pathlib.Path, validation: str, test: str, speeds: Sequence[float]
) -> dict[str, int]:
    """Writes the three splits, which share no speaker; returns how many recordings each has.

    The training recordings are also written once at every speed, because three speakers are few.
    """
    recordings = read_archive(archive)
    speakers = sorted({one.speaker for one in recordings})
    for name in (validation, test):
        require(name in speakers, f"speaker {name!r} is not in {archive}; it has {', '.join(speakers)}")
    counts = {}
    for split in ("train", "validation", "test"):
        held = {"validation": {validation}, "test": {test}}.get(split, set(speakers) - {validation, test})
        chosen = [one for one in recordings if one.speaker in held]
        copies = [dataclasses.replace(one, speed=speed) for one in chosen for speed in speeds if split == "train"]
        source = Recordings((*chosen, *copies))
        export_array_record(source, folder, split)
        counts[split] = len(source)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=pathlib.Path, help="a tar of WAV files and transcripts.tsv")
    parser.add_argument("folder", type=pathlib.Path, help="where to write train, validation and test")
    parser.add_argument("--validation", default="s4", help="the speaker who validates (default: s4)")
    parser.add_argument("--test", default="s5", help="the speaker who tests (default: s5)")
    speeds = [0.8, 0.87, 0.93, 1.07, 1.15, 1.25]
    text = "copies of the train recordings, played at these speeds (default: 0.8 to 1.25 in six steps)"
    parser.add_argument("--speeds", type=float, nargs="*", default=speeds, help=text)
    options = parser.parse_args()
    try:
        counts = convert(options.archive, options.folder, options.validation, options.test, options.speeds)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(f"{options.folder}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))


if __name__ == "__main__":
    main()
