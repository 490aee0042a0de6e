"""Only verified damage is reported: every changed bit if there are checksums, else whatever cannot be read."""

import dataclasses
import os
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train import checkpoint as module
from anyexperts_jax.train import integrity
from anyexperts_jax.train.checkpoint import Checkpoints
from anyexperts_jax.train.integrity import CHECKSUMS_NAME, JSON_ITEMS, TREE_ITEMS, find_damage, write_checksums
from anyexperts_jax.train.run_dir import TRAIN_LOCK
from train.checkpoint_test import CONFIG, abstract, assert_same, state_at

ITEMS = (*TREE_ITEMS, *JSON_ITEMS, "metrics")
UNREAD = ("commit_success.txt", "_CHECKPOINT_METADATA", CHECKSUMS_NAME)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory, keep_last=2)
    for step in (1, 2):
        checkpoints.save(state_at(step), {"next_index": step}, CONFIG)
    checkpoints.wait()
    checkpoints.close()
    return directory


@pytest.fixture
def folder(written, tmp_path):
    """A copy of checkpoint 2, next to one of checkpoint 1."""
    return shutil.copytree(written, tmp_path / "checkpoints") / "2"


def restore(folder):
    checkpoints = Checkpoints(folder.parent, read_only=True)
    try:
        return checkpoints.restore(int(folder.name), abstract(state_at(0)), CONFIG)[0]
    finally:
        checkpoints.close()


def flip(path):
    """Flips one bit in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def hang(path):
    path.unlink()
    path.symlink_to("nowhere")


def exchange(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, cut, empty, os.unlink, hang, exchange])
def test_damage_to_any_file_is_found_and_the_file_named(folder, damage):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in UNREAD and path.stat().st_size]
    assert len(files) > 15
    assert find_damage(folder, ITEMS) is None
    for path in files:
        kept = path.with_name("kept")
        shutil.copy2(path, kept)
        damage(path)
        found = find_damage(folder, ITEMS)
        assert found is not None, path
        assert found.path == path
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        kept.rename(path)
    assert find_damage(folder, ITEMS) is None


def test_the_work_is_shared_by_several_processes(folder):
    path = max((folder / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(path)
    found = [find_damage(folder, ITEMS, (index, 3)) for index in range(3)]
    assert [one is not None and one.path == path for one in found].count(True) == 1
    assert found.count(None) == 2


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"files": 5}', b'{"files": {"params/_METADATA": [1]}}', b"\xff\xfe"]
)
def test_invalid_checksums_count_as_damage(folder, text):
    (folder / CHECKSUMS_NAME).write_bytes(text)
    with pytest.raises(
        UserError, match=rf"checkpoint 2 in .* is unreadable \({folder}/checksums\.json is not what was"
    ):
        restore(folder)


def test_a_file_that_cannot_be_read_is_not_called_damaged(folder, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(integrity, "os", SimpleNamespace(stat=refuse))
    with pytest.raises(UserError, match=rf"^cannot read {folder}/params/\S+: Permission denied$"):
        find_damage(folder, ["params"])


def test_other_files_beside_a_checkpoint_do_not_matter(folder):
    (folder / "params" / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder.parent / "²").mkdir()
    (folder.parent / "٣").mkdir()
    (folder.parent / "007").mkdir()
    (folder.parent / "9.orbax-checkpoint-tmp").mkdir()
    (folder.parent / "notes").write_text("mine")
    (folder.parent / "link").symlink_to("nowhere")
    assert_same(restore(folder), state_at(2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text(""), "is not a folder; move it away"),
        (lambda path: path.symlink_to("nowhere"), "is not a folder; move it away"),
        (lambda path: path.mkdir(), "holds nothing of one; move it away"),
        (lambda path: (path / "more").mkdir(parents=True), "holds nothing of one; move it away"),
    ],
    ids=["a file", "a link to nothing", "an empty folder", "a folder of something else"],
)
def test_an_entry_with_a_checkpoints_name_that_is_not_one_is_named(folder, make, said):
    path = folder.parent / "9"
    make(path)
    with pytest.raises(UserError, match=f"^{path} is in the place of a checkpoint but {said}$"):
        restore(folder)


def test_a_link_to_a_checkpoint_is_accepted(folder, tmp_path):
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved", target_is_directory=True)
    assert_same(restore(folder), state_at(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_arrays_must_be_finite_whatever_the_checksums_say(tmp_path, value):
    for step in (1, 2):
        table = state_at(step).params["table"].at[3, 4].set(value if step == 2 else 0.0)
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
        checkpoints.save(dataclasses.replace(state_at(step), params={"table": table}), {}, CONFIG)
        checkpoints.wait()
        checkpoints.close()
    folder = tmp_path / "checkpoints" / "2"
    message = r"checkpoint 2 in .* is unusable: params/table is not finite; move .*/2 away to resume from step 1$"
    for checksums in (True, False):
        if not checksums:
            (folder / CHECKSUMS_NAME).unlink()
        with pytest.raises(UserError, match=message):
            restore(folder)


def test_a_checkpoint_without_checksums_is_read_where_what_it_holds_is_a_number(folder):
    (folder / CHECKSUMS_NAME).unlink()
    assert_same(restore(folder), state_at(2))


def test_a_fault_of_ours_is_not_called_damage(folder, monkeypatch):
    def fail(*arguments, **options):
        raise TypeError("a fault in the program")

    monkeypatch.setattr(module.ocp.CheckpointManager, "restore", fail)
    with pytest.raises(TypeError, match="a fault in the program"):
        restore(folder)


def test_a_whole_checkpoint_without_the_arrays_asked_for_is_of_another_version(folder):
    checkpoints = Checkpoints(folder.parent, read_only=True)
    wanted = {"table": state_at(0).params["table"], "more": {"bias": jnp.zeros(3)}}
    message = r"checkpoint 2 in .* is of another version of this package: its params lack more/bias$"
    with pytest.raises(UserError, match=message):
        checkpoints.restore_model(2, abstract(wanted), abstract(state_at(0).router_bias_LC))
    checkpoints.close()


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_called_damaged(folder, monkeypatch):
    (folder.parent.parent / TRAIN_LOCK).touch()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: shutil.rmtree(folder))
    os.unlink(folder / "params" / "_METADATA")  # the removal has begun
    with pytest.raises(UserError, match=r"checkpoint 2 in .* was deleted by the running training; run this again$"):
        restore(folder)


def test_checksums_cover_every_file_but_those_written_later(folder):
    before = (folder / CHECKSUMS_NAME).read_text()
    (folder / CHECKSUMS_NAME).unlink()
    write_checksums(folder)
    assert (folder / CHECKSUMS_NAME).read_text() == before
    assert '"params/manifest.ocdbt"' in before
    assert "_CHECKPOINT_METADATA" not in before
