"""Damaged pictures, sounds, datasets, checkpoints and logs: each is read correctly or refused in one line."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
from evaluate.stand_in import DATA, trained, write_run
from PIL import Image
from report.report_test import evaluation
from scipy.io import wavfile

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.example import LEVELS, SAMPLE_RATE
from anyexperts_jax.data.prepare import prepare
from anyexperts_jax.evaluate import ask as asking
from anyexperts_jax.evaluate import trained as loading
from anyexperts_jax.evaluate.results import JSON_NAME, load_evaluation, save_evaluation
from anyexperts_jax.train.log_shape import require_complete
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_log import read_records

datasets = pytest.importorskip("datasets")

FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
LOGS = ("metrics.jsonl", JSON_NAME)
QUESTION = ("--question", "what is it?")


@dataclasses.dataclass(frozen=True)
class Whole:
    """The files before they are damaged."""

    root: pathlib.Path  # pictures, sounds, dataset, run
    trained: loading.Trained  # what the run's checkpoint holds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    (root / "pictures").mkdir()
    for form in FORMS:
        picture.save(root / "pictures" / f"a.{form.lower()}", form)
    (root / "sounds").mkdir()
    for dtype in (np.int16, np.float32):
        samples = (rng.uniform(-1, 1, 300) * (32767 if dtype == np.int16 else 1)).astype(dtype)
        wavfile.write(root / "sounds" / f"{dtype.__name__}.wav", SAMPLE_RATE, samples)
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1), "level": 1 + i % 3} for i in range(5)]
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(root / "dataset"))
    one = trained()
    save_evaluation(evaluation(), write_run(root / "run", one))
    return Whole(root, one)


def damage(rng, path, foreign):
    """Cuts, flips, empties, doubles, renames or removes the file, or puts something of another kind in its place."""
    data = bytearray(path.read_bytes())
    place = int(rng.integers(max(len(data), 1)))
    match str(rng.choice(["cut", "flip", "flip", "overwrite", "empty", "double", "rename", "folder", "link", "kind"])):
        case "cut":
            path.write_bytes(data[:place])
        case "flip":
            for at in rng.integers(len(data), size=rng.integers(1, 4)) if data else ():
                data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
        case "overwrite":
            path.write_bytes(data[:place] + rng.bytes(8) + data[place + 8 :])
        case "empty":
            path.write_bytes(b"")
        case "double":
            path.write_bytes(data + data)
        case "rename":
            path.rename(path.with_name(f"{path.stem}_2{path.suffix}"))
        case "folder":
            path.unlink()
            path.mkdir()
        case "link":
            path.unlink()
            path.symlink_to("nowhere")
        case "kind":
            path.write_bytes(foreign[rng.integers(len(foreign))].read_bytes())


def files_in(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def contents(root):
    """Every name below `root`, with the bytes of those that are files."""
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `generate` with a model that answers nothing; returns the refusal, or what the model would have seen."""
    seen = []

    def ask(one, example, budget=None):
        seen.append((one, example))
        return asking.Reply("nothing", {"text": 1.0}, (3.0, 6.0))

    monkeypatch.setattr(asking, "ask", ask)

    def run(*arguments, given=None):
        if given is not None:
            monkeypatch.setattr(loading, "load_trained", lambda *_: given)
        code = main(["generate", *map(str, arguments)])
        said = capsys.readouterr().err
        if code == 0:
            return None, *seen.pop()
        assert code == 2, said
        assert said.startswith("anyexperts: ")
        assert said.count("\n") == 1
        return said, None, None

    return run


def read_picture(rng, whole, folder, command):
    path = folder / f"a.{FORMS[rng.integers(len(FORMS))].lower()}"
    damage(rng, path, files_in(whole.root))
    refusal, _, example = command("run", *QUESTION, "--image", path, given=whole.trained)
    if example is not None:
        assert example.image.dtype == np.uint8
        spec = whole.trained.config.data.encoding
        rows, columns, channels = prepare(example, spec).image.shape  # as the model sees it: whole patches
        assert (rows % spec.patch_size, columns % spec.patch_size, channels) == (0, 0, 3)
        assert 1 <= rows * columns // spec.patch_size**2 <= spec.max_patches
    return refusal, path


def read_sound(rng, whole, folder, command):
    path = folder / f"{rng.choice(['int16', 'float32'])}.wav"
    damage(rng, path, files_in(whole.root))
    refusal, _, example = command("run", *QUESTION, "--audio", path, given=whole.trained)
    if example is not None:
        assert example.audio.dtype == np.float32
        assert example.audio.size > 0
        assert np.abs(example.audio).max() <= 1  # fails for NaN too
    return refusal, path


def read_dataset(rng, whole, folder, command):
    data = dataclasses.replace(DATA, domains=("mine",), folders=(f"mine={folder}",))
    given = dataclasses.replace(whole.trained, config=dataclasses.replace(whole.trained.config, data=data))
    damage(rng, files_in(folder)[rng.integers(len(files_in(folder)))], files_in(whole.root))
    refusal, _, example = command("run", "--domain", "mine", "--index", rng.integers(5), given=given)
    if example is not None:
        assert isinstance(example.question, str)
        assert isinstance(example.answer, str)
        assert example.level in LEVELS
    return refusal, folder


def read_checkpoint(rng, whole, folder, command):
    files = [path for path in files_in(folder) if path.name not in LOGS]
    damage(rng, files[rng.integers(len(files))], files_in(whole.root))
    before = contents(folder)
    refusal, one, _ = command(folder, *QUESTION)
    if one is not None:
        jax.tree.map(np.testing.assert_array_equal, one.params, whole.trained.params)
    assert contents(folder) == before
    return refusal, folder


def read_log(rng, whole, folder, command):
    damage(rng, folder / LOGS[rng.integers(len(LOGS))], files_in(whole.root))
    before = contents(folder)
    refusal = None
    try:
        records = read_records(RunDir(folder).metrics)
        require_complete(records, RunDir(folder).metrics)
        load_evaluation(folder)
        assert all(type(record["step"]) is int for record in records)
    except UserError as error:
        refusal = str(error)
    assert contents(folder) == before
    return refusal, folder


READERS = {
    "pictures": (read_picture, "pictures"),
    "sounds": (read_sound, "sounds"),
    "datasets": (read_dataset, "dataset"),
    "checkpoints": (read_checkpoint, "run"),
    "logs": (read_log, "run"),
}


@pytest.mark.timeout(60, func_only=True)  # the files are written once
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(fuzz_case, whole, tmp_path, command):
    rng = np.random.default_rng([24, 1, fuzz_case])
    read, kept = READERS[list(READERS)[fuzz_case % len(READERS)]]
    folder = shutil.copytree(whole.root / kept, tmp_path / "damaged")
    refusal, path = read(rng, whole, folder, command)
    if refusal is not None:
        assert str(path) in refusal
        assert "\n" not in refusal.strip()
        assert len(refusal) < 600
