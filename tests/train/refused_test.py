"""A rejected command changes no byte, time or name of any file, wherever the error is raised."""

import dataclasses
import json
import shutil

import pytest

from anyexperts_jax.cli import main as cli
from anyexperts_jax.data.array_records import export_array_record
from anyexperts_jax.data.source import GeneratedSource
from anyexperts_jax.train import loop
from anyexperts_jax.train.config import to_json
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.optim import OptimConfig
from train.stand_in import DATA, linear_apply, run_config

STEPS = 3


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of three steps, trained to its end."""
    root = tmp_path_factory.mktemp("runs") / "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "model_apply", lambda config, placement: linear_apply)
        train(run_config(steps=STEPS, optim=OptimConfig(lr=0.01, warmup_steps=1)), root, progress=False)
    return root


@pytest.fixture
def run(done, tmp_path, monkeypatch):
    """A copy of the run in an otherwise empty current directory."""
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: linear_apply)
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(done, tmp_path / "run")


def everything(root):
    """All names, and times and bytes of files; not times of folders, which the deleted lock changes."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def refused(root, *arguments, code=2):
    """The one-line message of a rejected command, which must change nothing."""
    before = everything(root)
    try:
        found = cli.main(list(map(str, arguments)))
    except SystemExit as stop:  # raised by the parser
        found = stop.code
    assert found == code
    assert everything(root) == before
    return before


CONFIG = ("train", "run/config.json", "--run", "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=2", "the run in run is at step 3, past train.steps=2"),
        ("train.batch_size=16", "the run in run is of another configuration: train.batch_size (16, was 8)"),
        ("seed=7", "is of another configuration: seed (7, was 0)"),
        ("optim.lr=2.0", "is of another configuration: optim.lr (2.0, was 0.01)"),
        ("mesh.data=3", "mesh data=3 needs 3 devices, there are 8"),
        ("train.keep_last=0", "train.keep_last=0 must be >= 1"),
        ("optim.rl=1", "unknown key optim.rl"),
    ],
)
def test_an_option_that_does_not_fit_the_run(run, tmp_path, capsys, override, message):
    refused(tmp_path, *CONFIG, "--set", override)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def metrics_lost(run):
    (run / "metrics.jsonl").unlink()


def metrics_foreign(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("5\n")


def parameters_cut(run):
    path = max((run / "checkpoints" / "3" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:1000])


def data_state_foreign(run):
    (run / "checkpoints" / "3" / "checksums.json").unlink()
    (run / "checkpoints" / "3" / "data" / "metadata").write_text('{"next": 3}')


def config_foreign(run):
    (run / "config.json").write_bytes((run / "config.json").read_text().encode("utf-16"))


def killed_while_writing(run):
    """The remains of a run killed while writing a checkpoint, which the next accepted run removes."""
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "6.orbax-checkpoint-tmp")
    metrics_lost(run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (metrics_lost, "the run is done, but run/metrics.jsonl has lost its validation records"),
        (metrics_foreign, "run/metrics.jsonl, line 5: not a JSON object"),
        (parameters_cut, "checkpoint 3 in run/checkpoints is unreadable (run/checkpoints/3/params/"),
        (data_state_foreign, "the data state in run/checkpoints/3/data is not one of this run's data pipeline"),
        (config_foreign, "config run/config.json is not UTF-8 text (it looks like UTF-16)"),
        (killed_while_writing, "has lost its validation records"),
    ],
)
def test_a_directory_that_is_not_what_it_was(run, tmp_path, capsys, damage, message):
    (tmp_path / "same.json").write_text((run / "config.json").read_text())
    damage(run)
    refused(tmp_path, "train", "same.json", "--run", "run")
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("start_from", "nowhere", "no run in nowhere"),
        ("start_from", "gs://bucket/x", "run directory gs://bucket/x"),
        ("eval_examples", 9, "fewer than the 9 asked for"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_directory(tmp_path, capsys, monkeypatch, field, value, message):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 8), ("validation", 8)):
        export_array_record(GeneratedSource("nlp", split, count, 0, (1,)), tmp_path / "own", split)
    data = dataclasses.replace(DATA, domains=("own",), folders=("own=own",))
    config = run_config(data=data)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **{field: value}))
    (tmp_path / "one.json").write_text(to_json(config))
    refused(tmp_path, "train", "one.json", "--run", "a/b/run")
    assert message in capsys.readouterr().err


def test_a_model_that_fails_as_it_is_compiled_leaves_no_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.json").write_text(to_json(run_config()))
    refused(tmp_path, "train", "one.json", "--run", "a/run", "--set", "model.stack.dispatch=sideways")
    assert "sideways" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["evolving", "routing"])
def test_a_stage_before_its_turn_leaves_no_directory(tmp_path, capsys, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "evolve", "evolve_smoke", "--run", "evolved", "--stage", stage)
    assert "run that stage first" in capsys.readouterr().err


def test_an_evolve_run_that_cannot_begin_leaves_no_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "evolve", "evolve_smoke", "--run", "evolved", "--set", "mesh.data=3")
    assert "needs 3 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("evaluate", "run", "--budget", "99"), "out of reach"),
        (("evaluate", "run", "--domain", "speech"), "domain='speech' is unknown"),
        (("evaluate", "run", "--examples", "0"), "--examples: 0 must be >= 1"),
        (("evaluate", "nowhere"), "no run in nowhere"),
        (("report", "nowhere"), "no run in nowhere"),
        (("generate", "nowhere"), "no run in nowhere"),
        (("generate", "run", "--index", "-1"), "--index=-1"),
        (("generate", "run", "--question", "x", "--audio", "none.wav"), "cannot read the sound in none.wav"),
    ],
)
def test_a_question_to_a_run_that_it_cannot_answer(run, tmp_path, capsys, command, message):
    refused(tmp_path, *command)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe{\x00", b"[]", b'{"step": 3}', b"null"])
def test_a_report_on_a_foreign_evaluation_leaves_the_one_before(run, tmp_path, capsys, text):
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("the one before")
    (run / "report" / "load.png").write_bytes(b"its picture")
    (run / "evaluation.json").write_bytes(text)
    refused(tmp_path, "report", "run")
    said = capsys.readouterr().err
    assert "run/evaluation.json" in said
    assert said.count("\n") == 1


def test_an_accepted_run_resumes_and_removes_what_a_kill_left(run, tmp_path):
    killed = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "3", killed)
    assert cli.main([*CONFIG, "--set", "train.steps=6"]) == 0
    assert not killed.exists()
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 6
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6"]
    assert not [path for path in run.iterdir() if path.suffix in (".lock", ".new")]
