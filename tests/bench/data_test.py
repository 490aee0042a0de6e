"""`bench data`: a row per domain and modality, a plain loop for comparison, and memory that does not grow."""

import csv
import dataclasses
import gc
import tracemalloc

import numpy as np
import pytest
from data.examples import audio_example, image_example, text_example

from anyexperts_jax.bench.data import SPLIT, bench_data, data_tables, write_bench
from anyexperts_jax.bench.plain_loops import plain_loop
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.array_records import export_array_record
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.pipeline import train_iterator

SPEC = EncodingSpec(max_length=80, max_patches=8, max_frames=16)


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A source of `length` examples, made by `makers` in turn."""

    length: int
    makers: tuple = (text_example, image_example, audio_example)
    question_types = ("which",)
    metric = "exact"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.makers[index % len(self.makers)]()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    export_array_record(Repeated(6), folder, SPLIT, shards=2)
    return DataConfig(domains=("mine", "nlp"), folders=(f"mine={folder}",), encoding=SPEC, threads=0)


@pytest.fixture(scope="module")
def bench(config):
    return bench_data(config, examples=6, rounds=1)


def test_every_domain_and_modality_has_a_row(bench):
    assert [(one.domain, one.modality, one.examples) for one in bench.speeds] == [
        ("mine", "text", 2), ("mine", "image", 2), ("mine", "audio", 2), ("nlp", "text", 6),
    ]  # fmt: skip
    for one in bench.speeds:
        assert one.same_per_second > 0
        tokens = one.tokens_per_second / one.examples_per_second
        expected = {("mine", "text"): 15, ("mine", "image"): 13, ("mine", "audio"): 23}.get((one.domain, one.modality))
        assert expected is None or tokens == pytest.approx(expected)
    picture = bench.speeds[1]
    assert picture.megabytes_per_second / picture.examples_per_second == pytest.approx((16 * 24 * 3 + 4) / 1e6)


def test_only_files_are_compared_with_a_plain_loop(bench, config):
    *mine, nlp = bench.speeds
    assert (nlp.plain, nlp.plain_per_second, nlp.ratio) == (None, None, None)
    for one in mine:
        assert one.plain == "array_record, numpy, str.encode"
        assert one.plain_per_second > 0
        assert one.ratio > 0
    assert plain_loop(config, "nlp", SPLIT) is None
    assert plain_loop(config, "mine", "test") is None


def test_tables_are_printed_and_files_written(bench, tmp_path):
    speeds, plain = data_tables(bench)
    assert [row[:3] for row in speeds.rows][:2] == [("mine", "text", "2"), ("mine", "image", "2")]
    assert plain.rows[-1][3:] == ("-", "-", "-", "generated")
    paths = write_bench(bench, tmp_path, "anyexperts bench data mine")
    assert len(list(csv.DictReader(paths[1].read_text().splitlines()))) == 4
    assert "`anyexperts bench data mine`" in paths[2].read_text()


def test_bad_numbers_are_refused(config):
    with pytest.raises(UserError, match="rounds=0 must be >= 1"):
        bench_data(config, rounds=0)


def test_the_command_prints_the_speeds(config, capsys):
    changes = ["--set", 'data.domains=["nlp"]', "--set", "data.weights=[1]"]
    assert main(["bench", "data", "smoke", "--examples", "2", "--rounds", "1", *changes]) == 0
    shown = capsys.readouterr()
    assert "nlp: 2 examples" in shown.err
    assert "MB/s" in shown.out


@pytest.mark.slow
def test_memory_is_flat_over_a_corpus_ten_times_as_long(tmp_path):
    """Measures the Python and NumPy memory that a pass of a packed, shuffled pipeline leaves allocated."""

    def kept(examples, name):
        folder = tmp_path / name
        export_array_record(Repeated(examples, (text_example,)), folder, SPLIT)
        data = DataConfig(domains=("mine",), folders=(f"mine={folder}",), encoding=SPEC, threads=0)
        tracemalloc.start()
        try:
            batches = train_iterator(dataclasses.replace(data, packing="first_fit", packing_window=2), 2)
            seen = 0
            while seen < examples:
                seen += int((np.asarray(next(batches).segment_BT).max(axis=1) + 1).sum())
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    kept(20, "first")  # imports and opens files once
    short, long = kept(20, "short"), kept(200, "long")
    assert long < short + 2**16, "of 180 further examples, each of a KB at least"


def test_the_plain_loop_over_a_hugging_face_dataset(tmp_path):
    """It reads the same rows with pyarrow, tokenizers and soundfile."""
    datasets = pytest.importorskip("datasets")
    from io import BytesIO

    from PIL import Image
    from scipy.io import wavfile

    sound, picture = BytesIO(), BytesIO()
    wavfile.write(sound, 16_000, np.ones(800, np.int16))
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    rows = {"question": ["a?", "b?"], "answer": ["c", "d"], "audio": [{"bytes": sound.getvalue()}, None]}
    rows["image"] = [None, {"bytes": picture.getvalue()}]
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "mine"))
    data = DataConfig(domains=("mine",), folders=(f"mine={tmp_path / 'mine'}",), encoding=SPEC, threads=0)
    bench = bench_data(data, examples=2, rounds=1)
    assert [(one.modality, one.plain) for one in bench.speeds] == [
        ("audio", "pyarrow, soundfile, str.encode"),
        ("image", "pyarrow, soundfile, str.encode"),
    ]
    assert all(one.ratio > 0 for one in bench.speeds)
