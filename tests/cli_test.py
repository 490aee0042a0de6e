"""The command line as users see it: exit codes, and one clear line for each error."""

import dataclasses
import re

import pytest
from train.stand_in import DATA, run_config

from anyexperts_jax.cli import main as cli
from anyexperts_jax.data.domain import domain
from anyexperts_jax.train.config import to_json
from anyexperts_jax.train.optim import OptimConfig


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tinny"], r"no config 'tinny'.*tiny"),
        (["train", "missing.toml"], r"cannot read config missing.toml"),
        (["train", "smoke", "--set", "optim.learning_rate=1"], r"optim.learning_rate.*valid|optim.*lr"),
        (["train", "smoke", "--set", "optim.lr=fast"], r"optim.lr"),
        (["train", "smoke", "--set", "model.moe.k_min=99"], r"k_min=99"),
        (["train", "smoke", "--set", "model.moe.switches.iar=sideways"], r"sideways.*multiply_logits"),
        (["train", "smoke", "--set", "steps"], r"key=value"),
        (["evolve", "evolve_tinny"], r"evolve_tinny.*did you mean evolve_tiny"),
        (["evolve", "evolve_smoke", "--set", "evolve.evolution.mode=emma"], r"evolution.mode.*emma.*literal"),
        (["evolve", "evolve_smoke", "--stage", "third"], r"stage='third' is unknown; valid: warm_up, evolving, rout"),
        (["evolve", "evolve_smoke", "--stage", "routing"], r"stage routing starts from the end of stage evolving"),
        (["evaluate", "no/such/run"], r"no/such/run"),
        (["report", "no/such/run"], r"no/such/run"),
        (["generate", "no/such/run"], r"no/such/run"),
        (["data", "show", "painting"], r"painting.*general, ocr"),
        (["data", "show", "nlp", "--count", "0"], r"count=0"),
        (["bench", "layer", "--shape", "S9"], r"S9.*S1"),
        (["bench", "layer", "--dtype", "float8"], r"float8.*float32"),
        (["bench", "layer", "--implementation", "cuda"], r"implementation='cuda' is unknown; valid: reference, xla"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert re.search(message, one_line(capsys))


def test_a_sequence_longer_than_the_models_is_refused(capsys, tmp_path):
    command = ["train", "smoke", "--run", str(tmp_path / "run"), "--set", "data.encoding.max_length=256"]
    assert cli.main(command) == 2
    assert re.search(r"256.*128", one_line(capsys))


def test_an_empty_data_directory_is_refused(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    mixture = ["--set", 'data.domains=["own"]', "--set", f'data.folders=["own={tmp_path / "data"}"]']
    assert cli.main(["train", "smoke", "--run", str(tmp_path / "run"), *mixture]) == 2
    assert re.search(r"data is empty|is empty", one_line(capsys))


def test_data_show_writes_pictures(tmp_path, capsys):
    assert cli.main(["data", "show", "nlp", "--count", "3", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "nlp_train.png").stat().st_size > 1000
    assert "question" in capsys.readouterr().out


def test_data_show_takes_the_users_domains(tmp_path, capsys):
    """They come from --data, a configuration or a run."""
    own, out = tmp_path / "own", tmp_path / "out"
    assert cli.main(["data", "export", "nlp", str(own), "--count", "3"]) == 0
    assert cli.main(["data", "show", "--data", f"[/red]={own}", "--count", "9", "--out", str(out)]) == 0
    assert "[/red] has 3 train examples; 3 are shown" in capsys.readouterr().out
    config = to_json(
        run_config(data=dataclasses.replace(DATA, domains=("mine", "nlp"), folders=(f"mine={own}",), seed=1))
    )
    (tmp_path / "config.json").write_text(config)
    for given in (tmp_path, tmp_path / "config.json"):
        assert cli.main(["data", "show", "--config", str(given), "--count", "2", "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "mine_train" in printed
        assert domain("nlp").example("train", 1, seed=1).answer in printed
    assert cli.main(["data", "show", "mine", "--config", str(tmp_path), "--count", "2", "--out", str(out)]) == 0
    assert "nlp_train" not in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"%5B%2Fred%5D_train.png", "mine_train.png", "nlp_train.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "own"], r"--data entry 'own' must read NAME=PATH"),
        (["--data", "own=no/such"], r"the data directory no/such does not exist"),
        (["--data", "a=x", "--data", "a=y"], r"--data names 'a' twice"),
        (["--data", "a\nb=x"], r"'a\\nb' has characters that cannot be printed"),
        (["--data", "own=x", "--level", "1"], r"--level is for generated domains; own comes from a folder"),
        (["other", "--data", "own=x"], r"other.*is unknown; valid: general, ocr"),
        (["--config", "tinny"], r"no config 'tinny'"),
    ],
)
def test_data_show_refuses_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "show", *arguments]) == 2
    assert re.search(message, one_line(capsys))


def train_on_own_folder(tmp_path):
    """Trains the smallest model for two steps on the questions in the folder."""
    data = dataclasses.replace(DATA, domains=("own",), folders=(f"own={tmp_path / 'own'}",))
    (tmp_path / "own.json").write_text(to_json(run_config(data=data, steps=2, optim=OptimConfig(warmup_steps=1))))
    return ["train", str(tmp_path / "own.json"), "--run", str(tmp_path / "run")]


@pytest.mark.slow
def test_data_export_writes_a_folder_that_can_be_trained_on(tmp_path, capsys):
    for split, count in (("train", "5"), ("validation", "8")):
        command = ["data", "export", "nlp", str(tmp_path / "own"), "--split", split, "--count", count]
        assert cli.main(command) == 0
    assert cli.main(train_on_own_folder(tmp_path)) == 0
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert capsys.readouterr().out.endswith(f"run: {tmp_path / 'run'}\n")


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "has no split 'validation'; it has train"), (7, "holds 7 examples of split 'validation', fewer than the 8 a")],
)
def test_a_folder_without_enough_to_validate_on_is_refused_before_the_first_step(count, message, tmp_path, capsys):
    export = ["data", "export", "nlp", str(tmp_path / "own"), "--count"]
    assert cli.main([*export, "5"]) == 0
    assert count == 0 or cli.main([*export, str(count), "--split", "validation"]) == 0
    assert cli.main(train_on_own_folder(tmp_path)) == 2
    said = one_line(capsys)
    assert message in said
    assert said.endswith("; a run needs 8 validation examples of own (train.eval_examples)")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_path_that_cannot_be_written_is_one_line_and_exit_code_2(capsys):
    assert cli.main(["data", "export", "nlp", "/proc/nope"]) == 2
    line = "anyexperts: cannot read or write /proc/nope: No such file or directory; give a path where that is possible"
    assert one_line(capsys) == line


@pytest.mark.parametrize("file", ["train-00000-of-00001.part", "dataset.json.part"])
def test_a_full_disk_is_one_line_and_exit_code_4_in_every_command(file, tmp_path, capsys):
    """Both the record writer, which is native code, and Python find it; Python then does not name the file."""
    (tmp_path / file).symlink_to("/dev/full")
    assert cli.main(["data", "export", "nlp", str(tmp_path), "--count", "2"]) == 4
    line = f"anyexperts: cannot write to {tmp_path}: No space left on device; free some space and run it again"
    assert one_line(capsys) == line


def test_an_internal_error_is_not_reported_as_a_file_error(monkeypatch):
    def fail(options, **where):
        raise RuntimeError("a fault in the program")

    monkeypatch.setattr("anyexperts_jax.report.page.report", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["report", "nowhere"])


def test_unknown_commands_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fly"])
    assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 3.00 TiB for an array"), RuntimeError("RESOURCE_EXHAUSTED: 3.00 TiB\nat line 1")],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def fail(options, **where):
        raise error

    monkeypatch.setattr("anyexperts_jax.report.page.report", fail)
    assert cli.main(["report", "nowhere"]) == 2
    line = one_line(capsys)
    assert line.startswith("anyexperts: out of memory (")
    assert "3.00 TiB" in line
