"""From TOML to tables by the command line, on a model of one layer and text alone."""

import json
import shutil

import pytest

from experiments.reproduce.__main__ import main
from experiments.reproduce.experiment import load_experiment, runs_of
from experiments.reproduce.layer_times import LayerTimes, save_layer_times
from experiments.reproduce.output import QUICK_NOTE
from experiments.reproduce.recipes import TRAIN_FOLDER, drop_checkpoint, has_checkpoint

MODEL = """
preset = "tiny"
[model]
max_length = 96
vision = "none"
audio = "none"
[model.stack]
d_model = 16
num_layers = 1
num_dense_layers = 0
d_ff = 16
expert_d_ff = 4
num_shared_experts = 0
attention = { num_heads = 1, num_kv_heads = 1, head_dim = 8 }
[data]
domains = ["nlp"]
levels = [1]
threads = 0
[data.encoding]
max_length = 96
max_patches = 0
max_frames = 0
[optim]
warmup_steps = 1
[train]
steps = 40
batch_size = 8
checkpoint_every = 2
eval_every = 4
eval_examples = 8
"""
STATIC = """
[model.moe]
k_min = 8
k_max = 8
num_virtual = 0
rho_max = 0.0
hsm_site = "off"
iar = "off"
importance_weight = 0.0
"""
FIGURE = """
title = "The smallest"
base = "model.toml"
start = "start.toml"
seeds = [0, 1]
[evaluation]
test_examples = 8
validation_examples = 4
[quick]
seeds = [1]
set = ["train.steps=4"]
test_examples = 4
[[variants]]
name = "dynamic 8.0"
budgets = [4.8, 7.2, 8.0]
keep = [1]
"""
TIMES = LayerTimes("S1", 4096, "cpu", {}, None, ((4.0, 20.0), (10.0, 44.0)), ((4.0, 20.0), (8.0, 40.0)))


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "model.toml").write_text(MODEL)
    (tmp_path / "start.toml").write_text(MODEL + STATIC)
    path = tmp_path / "figure3.toml"
    path.write_text(FIGURE)
    return path


@pytest.mark.slow
def test_quick_by_the_command_line(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # the worker's: one device compiles sooner than eight
    runs, out = tmp_path / "runs", tmp_path / "out"
    out.mkdir()
    save_layer_times(TIMES, out)
    command = [str(experiment), "--quick", "--workers", "1", "--runs", str(runs), "--out", str(out)]
    assert main(command) == 0
    assert "1 runs are done, 0 failed, 0 are left" in capsys.readouterr().err
    (run,) = runs_of(*load_experiment(experiment), quick=True).values()
    folder = runs / run.id
    result = json.loads((folder / "result.json").read_text())
    assert [budget["budget"] for budget in result["budgets"]] == [4.8, 7.2, 8.0]
    assert result["step"] == 4
    assert result["separations"][0]["modality"] == "text"
    assert result["origin"].startswith("start_")
    page = (out / "README.md").read_text()
    assert QUICK_NOTE in page
    assert "goes on from one run of a static top-8, of 4 steps" in page
    (start,) = (runs / "stages").glob("start_*/checkpoints/4")
    assert f"starting from {start.parents[1]}" in (folder / "log.txt").read_text().replace("\n", "")
    assert (out / "figure3.png").exists()

    assert has_checkpoint(folder), "keep = [1]"
    (folder / "result.json").unlink()
    assert main([*command, "--only", "runs"]) == 0, "stopped between training and evaluation, it goes on from there"
    assert "all 4 steps are done" in (folder / "log.txt").read_text()
    again = json.loads((folder / "result.json").read_text())
    assert again["budgets"] == result["budgets"]

    shutil.rmtree(runs)
    assert main([*command, "--only", "tables"]) == 0
    assert "dynamic, one checkpoint" in (out / "README.md").read_text(), "from runs.jsonl alone"


def test_files_that_are_not_kept_are_removed(tmp_path):
    folder = tmp_path / TRAIN_FOLDER / "checkpoints" / "4"
    folder.mkdir(parents=True)
    assert has_checkpoint(tmp_path)
    drop_checkpoint(tmp_path)
    assert not has_checkpoint(tmp_path)
    assert not (tmp_path / TRAIN_FOLDER).exists()
