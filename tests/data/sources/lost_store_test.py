"""A store is lost in the middle of an epoch: reads are retried, then the run ends in one line and can resume."""

import dataclasses
import itertools
import json
import pathlib
import types

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.bad_rows import BadRows
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.pipeline import train_iterator
from anyexperts_jax.data.sources import places
from anyexperts_jax.data.sources.places import StoreError

SECRET = "hunter2hunter2"
WAITS = (0.5, 1.0, 2.0)
SPEC = EncodingSpec(max_length=32, max_patches=4, max_frames=0)


class LostSystem(MemoryFileSystem):
    """A file system in memory. The next `fails` reads of a picture fail with a message that contains a key."""

    protocol = "lost"
    store: dict = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    fails = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("lost://", "memory://"))

    def cat_file(self, path, **how):
        if path.endswith(".png") and LostSystem.fails > 0:
            LostSystem.fails -= 1
            raise OSError(f"connection reset by peer; secret_access_key={SECRET}\nAuthorization: Bearer {SECRET}")
        return super().cat_file(path, **how)


@pytest.fixture
def waits(monkeypatch):
    """Records the pauses between retries instead of sleeping."""
    made = []
    monkeypatch.setattr(places, "WAITS", WAITS)
    monkeypatch.setattr(places, "time", types.SimpleNamespace(sleep=made.append))
    return made


@pytest.fixture
def data(monkeypatch, waits):
    from PIL import Image

    fsspec.register_implementation("lost", LostSystem, clobber=True)
    monkeypatch.setattr(LostSystem, "fails", 0)
    system = fsspec.filesystem("lost")
    rows = [{"question": f"q{i}?", "answer": f"a{i}", "image": f"{i}.png"} for i in range(40)]
    system.pipe("/bucket/all.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for i in range(40):
        with system.open(f"/bucket/{i}.png", "wb") as file:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
    return DataConfig(domains=("mine",), folders=("mine=lost://bucket/all.jsonl",), encoding=SPEC, threads=0)


def lose(reads):
    LostSystem.fails = reads


def same(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_a_store_that_comes_back_is_retried(data, waits):
    unbroken = list(itertools.islice(train_iterator(data, 4), 6))
    batches = train_iterator(data, 4)
    first = [next(batches) for _ in range(3)]
    lose(3)
    assert all(map(same, [*first, *itertools.islice(batches, 3)], unbroken))
    assert waits == list(WAITS)


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_lost_store_ends_in_one_line_and_the_iterator_resumes(data, on_bad_row, waits):
    data = dataclasses.replace(data, on_bad_row=on_bad_row, max_bad_share=0.9)
    unbroken = list(itertools.islice(train_iterator(data, 4), 6))
    skipped = BadRows(0.9)
    batches = train_iterator(data, 4, bad_rows=skipped)
    first = [next(batches) for _ in range(3)]
    state = batches.get_state()
    lose(1000)
    with pytest.raises(
        StoreError, match=r"all.jsonl line \d+: cannot read lost://bucket/\d+.png: connection"
    ) as caught:
        next(batches)
    said = str(caught.value)
    assert "tried 4 times over 3.5 s; the same command goes on from the last checkpoint" in said
    assert "\n" not in said
    assert SECRET not in said
    assert skipped.counts() == {}, "no row is at fault"
    skipped.close()
    lose(0)
    again = train_iterator(data, 4)
    again.set_state(state)
    assert all(map(same, [*first, *itertools.islice(again, 3)], unbroken))


def test_no_index_is_cached_after_a_failed_read(data, waits):
    """A store that is lost while a column is read row by row leaves nothing in the cache."""
    from anyexperts_jax.data.mixture import Sources

    system = fsspec.filesystem("lost")
    for i in range(6):
        system.pipe(f"/words/{i}.png", system.cat_file(f"/bucket/{i}.png"))
        system.pipe(f"/words/{i}.txt", b"a word")
    config = DataConfig(domains=("mine",), folders=("mine=lost://words",), encoding=SPEC, threads=0, held_out=0.2)
    lose(1000)
    with pytest.raises(UserError, match=r"cannot read lost://words/0.png: connection reset"):
        Sources(config).open("mine", "train")
    lose(0)
    sources = Sources(config)
    assert sum(len(sources.open("mine", split)) for split in ("train", "validation", "test")) == 6


@pytest.mark.slow
def test_a_run_ends_in_one_line_without_keys_and_resumes(data, tmp_path, capfd, waits, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    run = ["train", "smoke", "--data", "mine=lost://bucket/all.jsonl", "--run", str(tmp_path / "run")]
    for change in ("train.steps=4", "train.checkpoint_every=1", "train.eval_every=4", "train.eval_examples=2",
                   "train.batch_size=8", "data.threads=0", "optim.warmup_steps=0"):  # fmt: skip
        run += ["--set", change]
    reads = iter(range(30))  # reads of training pictures: about two batches and the checks before them
    healthy = LostSystem.cat_file

    def for_a_while(system, path, **how):
        if path.endswith(".png") and next(reads, None) is None:
            lose(1000)
        return healthy(system, path, **how)

    monkeypatch.setattr(LostSystem, "cat_file", for_a_while)
    assert main(run) == 2
    said = capfd.readouterr().err
    assert "cannot read lost://bucket/" in said.splitlines()[-1]
    monkeypatch.setattr(LostSystem, "cat_file", healthy)
    lose(0)
    assert main(run) == 0
    said += capfd.readouterr().err
    assert "resuming from the checkpoint of step" in said
    written = [path.read_bytes() for path in pathlib.Path(tmp_path).rglob("*") if path.is_file()]
    assert SECRET not in said
    assert not any(SECRET.encode() in one for one in written)
