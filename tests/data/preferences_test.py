"""Preferences: the forms of a row that are read, the two segments they become, and the runs that may read them."""

import itertools
import json

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.check import check_data
from anyexperts_jax.data.config import Columns, DataConfig, EncodingSpec
from anyexperts_jax.data.conversation import question_and_answer
from anyexperts_jax.data.packing import padding_shares
from anyexperts_jax.data.pipeline import eval_batches, train_iterator
from anyexperts_jax.data.sequence import last_runs
from anyexperts_jax.data.turns import encode_item, encode_pair
from data.records_test import outline, read
from data.turns_test import TEMPLATE, drawn, learned

SPEC = EncodingSpec(max_length=80, max_patches=8, max_frames=0)
USER, BETTER, WORSE = (
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "red"},
    {"role": "assistant", "content": "blue"},
)
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FORMS = {
    "texts": {"prompt": "What?", "chosen": "red", "rejected": "blue"},
    "a prompt of messages": {"prompt": [USER], "chosen": "red", "rejected": "blue"},
    "messages": {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
    "answers as messages": {"prompt": "What?", "chosen": [BETTER], "rejected": [WORSE]},
    "whole conversations": {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
    "whole ones beside the prompt": {"prompt": "What?", "chosen": [USER, BETTER], "rejected": [USER, WORSE], "id": 3},
    "other names": {"asked": "What?", "good": "red", "bad": "blue"},
}
NAMES = Columns(prompt="asked", chosen="good", rejected="bad")


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("as_examples", [True, False])
def test_forms_of_a_row(row, as_examples):
    found = read(row, as_examples=as_examples, columns=NAMES)
    assert outline(found) == [("user", ["What?"]), ("assistant", ["red"])]
    assert found.rejected.text == "blue"
    assert question_and_answer(found) == ("What?", "red")


def test_several_turns_and_a_picture():
    row = {"prompt": [*EARLIER, USER], "chosen": "red", "rejected": "blue"}
    assert [message.text for message in read(row).messages] == ["Hi", "Hello", "What?", "red"]
    seen = read({**FORMS["texts"], "image": "red.png"})
    assert outline(seen)[0] == ("user", ["image red", "What?"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "red", "rejected": "blue"}, "no column 'prompt': chosen holds an answer without what is asked"),
        ({**FORMS["texts"], "rejected": "red"}, "chosen and rejected are the same answer"),
        ({"chosen": [USER, BETTER], "rejected": [{**USER, "content": "Who?"}, WORSE]}, "differ before their last"),
        ({"chosen": [USER, BETTER, USER], "rejected": [USER, WORSE]}, "differ before their last answers"),
        ({"chosen": [*EARLIER, USER], "rejected": [*EARLIER, {**USER, "content": "Who?"}]}, "must end with an answer"),
        ({**FORMS["texts"], "rejected": ""}, "rejected: the assistant says nothing"),
        ({**FORMS["texts"], "chosen": 3}, "chosen must be a list of objects, not int"),
        ({"prompt": "What?", "chosen": "red"}, "a row holds messages, conversations, question and answer, chosen and"),
    ],
)
def test_rows_that_are_no_preference(row, message):
    with pytest.raises(UserError) as error:
        read(row)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("template", "wanted"), [(None, "red$blue$"), (TEMPLATE, "<a>red|<a>blue|")])
def test_a_pair_is_two_segments_that_learn_their_last_answers(template, wanted):
    item = read({"prompt": [*EARLIER, USER], "chosen": "red", "rejected": "blue"})
    pair = encode_pair(item, SPEC, template=template)
    length = len(encode_item(item, SPEC, template=template).tokens_T)
    assert pair.segment_T.tolist() == [0] * length + [1] * (len(pair.tokens_T) - length)
    assert pair.position_T[length] == 0
    assert drawn(pair).replace("|", "$").count("Hello") == 2
    assert learned(pair) == wanted


def test_the_last_run_of_each_row():
    mask = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    assert last_runs(mask).astype(int).tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def config(folder, rows, length=32, **options):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = EncodingSpec(max_length=length, max_patches=0, max_frames=0)
    return DataConfig(domains=("mine",), folders=(f"mine={path}",), encoding=spec, threads=0, held_out=0.3, **options)


def preference(number):
    return {"prompt": f"q{number}?", "chosen": f"good{number}", "rejected": f"bad{number}"}


def test_a_run_on_preferences_reads_pairs(tmp_path):
    data = config(tmp_path, [preference(i) for i in range(10, 40)])
    read = itertools.islice(train_iterator(data, 4, pairs=True), 2)
    for batch in [*read, next(eval_batches(data, "mine", "test", 4, 4, pairs=True))]:
        assert (np.asarray(batch.segment_BT).max(axis=1) == 1).all()
    alone = next(eval_batches(data, "mine", "test", 4, 4))  # as an evaluation reads them: the better answer
    assert np.asarray(alone.segment_BT).max() == 0


def test_packed_pairs_stay_together(tmp_path):
    data = config(tmp_path, [preference(i) for i in range(1, 9)] * 4, length=64, packing="first_fit", packing_window=2)
    batch = next(train_iterator(data, 2, pairs=True))
    ends = np.asarray(batch.segment_BT).max(axis=1)
    assert ends.tolist() == [5, 5]
    assert padding_shares(batch, segments=2)[0] == pytest.approx(1 - np.asarray(batch.valid_BT).sum() / (6 * 64))


@pytest.mark.parametrize(
    ("row", "pairs", "message"),
    [
        (preference(1), False, "the row holds a rejected answer, which train.loss=dpo alone reads"),
        ({"question": "q?", "answer": "a"}, True, "the row is no preference; train.loss=dpo reads rows with prompt"),
        ({**preference(1), "prompt": "q" * 9}, True, "need 33 positions, 0 patches and 0 audio frames together"),
    ],
)
def test_the_loss_and_the_rows_must_fit(row, pairs, message, tmp_path):
    rows = [{**row, next(iter(row)): f"{i % 10}{next(iter(row.values()))[1:]}"} for i in range(30)]
    with pytest.raises(UserError) as error:
        next(train_iterator(config(tmp_path, rows), 4, pairs=pairs))
    assert message in str(error.value)
    assert "line" in str(error.value)


def test_a_check_counts_both_answers(tmp_path):
    long = {"prompt": "q" * 9, "chosen": "good1", "rejected": "bad1"}
    reports, _ = check_data(config(tmp_path, [*[preference(i) for i in range(30)], long]), processes=1)
    lengths = [length for report in reports for length in report.lengths]
    assert min(lengths) == len("^q1?/good1$^q1?/bad1$")
    assert sum(sum(report.reasons.values()) for report in reports) == 1
