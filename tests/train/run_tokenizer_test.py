"""A run's tokenizer: its ids match the model, the run keeps a copy, and a different one is rejected."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.batches import answers, questions
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.pipeline import eval_batches, train_iterator
from anyexperts_jax.tokenizers.store import RECORD, open_tokenizer, save_tokenizer
from anyexperts_jax.tokenizers.train import train_tokenizer
from anyexperts_jax.train.config import load_config, to_json
from anyexperts_jax.train.run_dir import RunDir, load_run, open_run_dir
from anyexperts_jax.train.run_tokenizer import keep_tokenizer, pin_tokenizer, require_same_tokens, with_kept_tokenizer
from train.stand_in import DATA, MODEL, run_config


def trained_on(folder, examples):
    """A tokenizer trained on questions of the domain, named after its folder."""
    source = open_source(DATA, "nlp", "train")
    save_tokenizer(train_tokenizer([source[i].question for i in examples], 320, name=folder.name), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained_on(tmp_path_factory.mktemp("tokenizers") / "questions", range(40))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return trained_on(tmp_path_factory.mktemp("tokenizers") / "other", range(0, 40, 2))


def data_with(folder, **changes):
    return dataclasses.replace(DATA, tokenizer=str(folder), **changes)


def model_for(tokenizer):
    special = tokenizer.special
    return dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, pad_id=special.pad, eos_id=special.eos[0])


# The pipeline's output


def test_sequences_are_the_tokenizers_and_read_back(folder):
    tokenizer, data = open_tokenizer(str(folder)), data_with(folder)
    special = tokenizer.special
    (batch,) = eval_batches(data, "nlp", "validation", 8, 6)
    examples = [open_source(data, "nlp", "validation", 6)[i] for i in range(6)]
    assert answers(batch, tokenizer) == [*(example.answer for example in examples), "", ""]
    assert questions(batch, tokenizer) == [*(example.question for example in examples), "", ""]
    assert (batch.tokens_BT[:6, 0] == special.bos).all()
    assert (batch.tokens_BT == special.sep).sum() == 6
    assert (batch.tokens_BT[~batch.valid_BT] == special.pad).all()
    assert (batch.tokens_BT[6:] == special.pad).all()
    byte_batch = next(eval_batches(DATA, "nlp", "validation", 8, 6))
    assert batch.valid_BT.sum() < 0.8 * byte_batch.valid_BT.sum(), "subwords make sequences shorter"


def test_evidence_lies_on_the_tokens_of_the_answers_characters(folder):
    tokenizer, data = open_tokenizer(str(folder)), data_with(folder)
    batch = next(eval_batches(data, "nlp", "validation", 8, 8))
    for i in range(8):
        example = open_source(data, "nlp", "validation", 8)[i]
        marked = tokenizer.decode(batch.tokens_BT[i][batch.evidence_BT[i]])
        wanted = "".join(example.question[start:stop] for start, stop in example.question_evidence)
        assert wanted.replace(" ", "") in marked.replace(" ", "")
        assert len(marked.replace(" ", "")) <= len(wanted.replace(" ", "")) + 2 * len(example.question_evidence)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_are_the_same_again_and_from_worker_processes(folder, workers):
    data = data_with(folder, workers=workers)
    first, again = next(train_iterator(data_with(folder), 4)), next(train_iterator(data, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)


# The model's ids


def test_a_configuration_takes_the_ids_of_its_tokenizer(folder):
    model = load_config("tiny", [f"data.tokenizer={folder}"]).model
    assert (model.vocab_size, model.pad_id, model.eos_id) == (320, 0, 3)
    model = load_config("tiny", [f"data.tokenizer={folder}", "model.vocab_size=512"]).model
    assert (model.vocab_size, model.pad_id, model.eos_id) == (512, 0, 3)
    assert load_config("tiny").model.vocab_size == 260


def test_a_saved_configuration_does_not_read_the_tokenizer(folder, tmp_path):
    config = load_config("tiny", [f"data.tokenizer={folder}"])
    gone = dataclasses.replace(config, data=data_with(tmp_path / "gone", domains=config.data.domains))
    (tmp_path / "config.json").write_text(to_json(gone))
    assert load_config(tmp_path / "config.json") == gone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 319}, r"ids of tokenizer 'questions' exceed the model's vocabulary: it has 320 ids, model.voc"),
        ({"pad_id": 5}, r"model.pad_id=5 is not of tokenizer 'questions'; set model.pad_id=0, model.eos_id=3"),
        ({"eos_id": 2}, r"model.eos_id=2 is not of tokenizer 'questions'; set model.pad_id=0, model.eos_id=3"),
        ({"pad_id": 7, "eos_id": 2}, r"model.pad_id=7, model.eos_id=2 is not of tokenizer"),
    ],
)
def test_ids_that_are_not_the_tokenizers_are_refused(folder, tmp_path, changes, message):
    model = dataclasses.replace(model_for(open_tokenizer(str(folder))), **changes)
    with pytest.raises(UserError, match=message):
        pin_tokenizer(data_with(folder), model, tmp_path / "none", begun=False)


def test_bytes_are_checked_too_and_leave_no_trace(tmp_path):
    assert pin_tokenizer(DATA, MODEL, tmp_path / "none", begun=False) == DATA
    with pytest.raises(
        UserError, match=r"model.eos_id=0 is not of tokenizer 'bytes'; set model.pad_id=256, model.eos_"
    ):
        pin_tokenizer(DATA, dataclasses.replace(MODEL, eos_id=0), tmp_path / "none", begun=False)
    with pytest.raises(UserError, match=r"data.token_fingerprint goes with a path"):
        pin_tokenizer(dataclasses.replace(DATA, token_fingerprint="0"), MODEL, tmp_path / "none", begun=False)
    keep_tokenizer(DATA, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
    assert with_kept_tokenizer(DATA, tmp_path / "tokenizer") == DATA


def test_a_model_smaller_than_bytes_needs_another_tokenizer(folder):
    small = {"vocab_size": 100, "pad_id": 0, "eos_id": 1}
    with pytest.raises(UserError, match="vocab_size=100 is below the tokenizer's 260"):
        run_config(model=dataclasses.replace(MODEL, **small))
    assert run_config(model=dataclasses.replace(MODEL, **small), data=data_with(folder)).model.vocab_size == 100


# The copy


def test_the_run_keeps_a_copy_and_the_configuration_its_fingerprint(folder, other, tmp_path):
    tokenizer = open_tokenizer(str(folder))
    data = pin_tokenizer(data_with(folder), model_for(tokenizer), tmp_path / "tokenizer", begun=False)
    assert data.token_fingerprint == tokenizer.fingerprint
    open_run_dir(tmp_path / "run", run_config(model=model_for(tokenizer), data=data))
    kept = RunDir(tmp_path / "run").tokenizer
    assert open_tokenizer(str(kept)).fingerprint == tokenizer.fingerprint
    assert with_kept_tokenizer(data, kept).tokenizer == str(kept)

    assert pin_tokenizer(data_with(folder), model_for(tokenizer), kept, begun=True) == data
    moved = pin_tokenizer(data_with(tmp_path / "gone"), model_for(tokenizer), kept, begun=True)
    assert (moved.tokenizer, moved.token_fingerprint) == (str(kept), tokenizer.fingerprint)
    with pytest.raises(UserError, match=r"the tokenizer is 'other' .* but the weights were trained with 'questions'"):
        pin_tokenizer(data_with(other), model_for(tokenizer), kept, begun=True)
    replaced = pin_tokenizer(data_with(other), model_for(tokenizer), kept, begun=False)
    keep_tokenizer(replaced, kept)
    assert open_tokenizer(str(kept)).name == "other"
    assert not kept.with_name("tokenizer.new").exists()


def test_another_fingerprint_than_the_configurations_is_refused(folder, other, tmp_path):
    tokenizer = open_tokenizer(str(folder))
    data = data_with(folder, token_fingerprint=open_tokenizer(str(other)).fingerprint)
    with pytest.raises(UserError, match=r"data.tokenizer=.*questions is 'questions' .* but data.token_fingerprint is "):
        pin_tokenizer(data, model_for(tokenizer), tmp_path / "none", begun=False)
    keep_tokenizer(data_with(folder), tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"is 'questions' .* but the checkpoint was trained with one of fingerprint"):
        with_kept_tokenizer(data, tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"the run has lost its tokenizer: there is no .*{RECORD}"):
        with_kept_tokenizer(data, tmp_path / "tokenizer")


def test_weights_of_another_tokenizer_are_refused_as_a_start(folder):
    fingerprint = open_tokenizer(str(folder)).fingerprint
    ours = data_with(folder, token_fingerprint=fingerprint)
    require_same_tokens(ours, data_with("elsewhere", token_fingerprint=fingerprint), "it")
    with pytest.raises(UserError, match=r"it was trained with the tokenizer bytes, not with .*questions: the same ids"):
        require_same_tokens(ours, DATA, "it")


# From the command line


def test_a_tokenizer_that_is_not_there_is_one_line_before_there_is_a_run(tmp_path, capsys):
    command = ["train", "smoke", "--run", str(tmp_path / "run"), "--set", f"data.tokenizer={tmp_path / 'gone'}"]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "gone' does not exist; give 'bytes' or a path" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_tokenizer_trains_goes_on_scores_and_answers(folder, other, tmp_path, capsys):
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(folder, mine)
    tokenizer = open_tokenizer(str(mine))
    config = run_config(model=model_for(tokenizer), data=data_with(mine), steps=3, eval_examples=4)
    (tmp_path / "run.json").write_text(to_json(config))
    command = ["train", str(tmp_path / "run.json"), "--run", str(run)]
    assert cli.main(command) == 0
    assert open_tokenizer(str(run / "tokenizer")).fingerprint == tokenizer.fingerprint
    capsys.readouterr()

    assert cli.main([*command, "--set", "train.steps=6", "--set", f"data.tokenizer={other}"]) == 2
    assert "but the weights were trained with 'questions'" in capsys.readouterr().err

    shutil.rmtree(mine)  # from here on the run's copy serves
    assert cli.main([*command, "--set", "train.steps=6"]) == 0
    loaded, _, _ = load_run(run, "last")
    assert loaded.data.tokenizer == str(run / "tokenizer")
    assert cli.main(["evaluate", str(run), "--examples", "4", "--calibration-examples", "4", "--budget", "2.5"]) == 0
    assert cli.main(["report", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--question", "What is 3 + 4?"]) == 0
    assert "question: What is 3 + 4?" in capsys.readouterr().out

    assert (run / "tokenizer" / RECORD).exists()
    shutil.rmtree(run / "tokenizer")
    assert cli.main(["generate", str(run), "--question", "What is 3 + 4?"]) == 2
    assert "the run has lost its tokenizer" in capsys.readouterr().err
