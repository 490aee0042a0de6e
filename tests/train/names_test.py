"""A run may have any name that a file system allows, or is rejected before its first step."""

import os
import pathlib

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train import loop
from anyexperts_jax.train.checkpoint import Checkpoints
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.path_alias import PathAlias
from anyexperts_jax.train.run_dir import load_run
from train.checkpoint_test import CONFIG, abstract, assert_same, state_at
from train.stand_in import linear_apply, run_config

NAMES = [
    "exp[lr=1e-3]", "[ab]", "st*r", "wh?t", "tr\\ack", "a b", " ", "-dash", "--run", "ümläut", "日本", "per%20cent",
    "ha#sh", "{a,b}", "quo'te\"", "a:b", "~", "$HOME", "!x", "a&b;c", "<x>", "...", ".hidden", "x" * 200,
]  # fmt: skip
REFUSED = ["new\nline", "tab\tbed", "bell\a", os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff")]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_read_again_under_any_name(tmp_path, name):
    """A neighbour whose name matches the run's name as a pattern is not touched."""
    (tmp_path / "star" / "checkpoints").mkdir(parents=True)
    for directory in (tmp_path / name / "checkpoints", tmp_path / name / "run" / "checkpoints"):
        checkpoints = Checkpoints(directory)
        checkpoints.save(state_at(1), {"next_index": 1}, CONFIG)
        checkpoints.wait()
        checkpoints.close()
        again = Checkpoints(directory, read_only=True)
        assert_same(again.restore(1, abstract(state_at(0)), CONFIG)[0], state_at(1))
        again.close()
        assert (directory / "1" / "params" / "manifest.ocdbt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name, "star"})


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_no_line_can_show_are_refused_before_the_first_step(tmp_path, name):
    for root in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(UserError, match=r"run directory .* has control characters or bytes that are not UTF-8"):
            train(run_config(), root, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp[lr=1e-3]", "tr\\ack"])
def test_a_run_is_trained_and_goes_on_under_an_odd_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: linear_apply)
    for steps in (3, 6):
        assert train(run_config(steps=steps), tmp_path / name / name, progress=False).step == steps
    assert load_run(tmp_path / name / name, "last")[0] == run_config(steps=6)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [name]


def test_an_alias_is_a_link_that_goes_when_it_is_closed(tmp_path):
    directory = tmp_path / "a[b]" / "checkpoints"
    directory.mkdir(parents=True)
    alias = PathAlias(directory)
    assert alias.path != directory
    assert alias.path.name == "checkpoints", "several processes compare this name"
    assert alias.path.resolve() == directory
    alias.close()
    alias.close()
    assert not alias.path.exists()
    assert directory.exists()
    plain = PathAlias(tmp_path)
    assert plain.path == tmp_path
    plain.close()


def test_an_alias_needs_a_plain_temporary_folder_and_one_process(tmp_path, monkeypatch):
    odd = tmp_path / "a[b]"
    odd.mkdir()
    monkeypatch.setattr("anyexperts_jax.train.path_alias.tempfile.tempdir", str(odd))
    with pytest.raises(UserError, match=r"a path with '\[' in it needs a temporary folder without; set TMPDIR"):
        PathAlias(odd)
    monkeypatch.setattr("anyexperts_jax.train.path_alias.processes.several", lambda: True)
    with pytest.raises(UserError, match=r"a path with '\[' in it works in one process alone"):
        PathAlias(pathlib.Path(odd))
