"""A run looks at, indexes and opens each of its sources once, whoever reads them."""

import json
from collections import Counter

import pytest

from anyexperts_jax.cli.main import main
from anyexperts_jax.data import mixture
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.data.sources import find
from anyexperts_jax.train import loop

CHANGES = ("train.steps=1", "optim.warmup_steps=0", "train.eval_examples=4")


@pytest.fixture
def opens(monkeypatch):
    """Counts from now on how often files, rows and tokenizers are looked up and each split is opened."""
    counted = Counter()

    def counting(name, call):
        def counted_call(*args, **kwargs):
            counted[name(*args)] += 1
            return call(*args, **kwargs)

        return counted_call

    monkeypatch.setattr(find, "find_files", counting(lambda place: "files", find.find_files))
    monkeypatch.setattr(mixture, "find_rows", counting(lambda place: "rows", mixture.find_rows))
    monkeypatch.setattr(mixture, "open_tokenizer", counting(lambda source: "tokenizer", mixture.open_tokenizer))
    opened = counting(lambda own, name, rows, split, *others: split, RowSource.__init__)
    monkeypatch.setattr(RowSource, "__init__", opened)
    return counted


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYEXPERTS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) + "\n" for i in range(60)))
    changes = [word for change in CHANGES for word in ("--set", change)]
    return ["train", "smoke", "--data", f"mine={path}", "--run", str(tmp_path / "run"), *changes]


ONCE = {"files": 1, "rows": 1, "tokenizer": 1, "train": 1, "validation": 1, "test": 1}


def test_each_is_opened_once_before_the_first_step(opens, command, monkeypatch):
    def read_alone(run):
        next(run.iterator)
        run.iterator.close()
        return loop.TrainResult(run.paths.root, 1, {}, 0)

    monkeypatch.setattr(loop._Run, "run", read_alone)
    assert main(command) == 0
    assert opens == ONCE


@pytest.mark.slow
def test_each_is_opened_once_by_a_whole_run_and_by_its_evaluation(opens, command):
    assert main(command) == 0
    assert opens == ONCE
    opens.clear()
    amounts = ["--examples", "2", "--calibration-examples", "2", "--budget", "4.8"]
    assert main(["evaluate", command[command.index("--run") + 1], *amounts]) == 0
    assert opens == {name: count for name, count in ONCE.items() if name != "train"}
