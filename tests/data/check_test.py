"""`data check` reads the data once before a run: it counts examples, unusable rows and overlap between splits."""

import io
import json

import pytest
from rich.console import Console

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.text_table import print_tables
from anyexperts_jax.data.check import check_data, require_clean
from anyexperts_jax.data.check_tables import draw_lengths, reason_lines, shared_table, split_table, unusable_table
from anyexperts_jax.data.config import DataConfig, EncodingSpec

SPEC = EncodingSpec(max_length=64, max_patches=0, max_frames=0)
WORDS = "one two three four five six seven eight nine ten eleven"


def question(number):
    return {"question": f"q{number}?", "answer": f"a{number}"}


def config(folder, splits, **options):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(domains=("mine",), folders=(f"mine={folder}",), encoding=SPEC, threads=0, **options)


def three(train=(), validation=(), test=()):
    plain = {name: [question(start + i) for i in range(3)] for name, start in (("train", 0), ("validation", 10))}
    plain["test"] = [question(20 + i) for i in range(3)]
    more = {"train": train, "validation": validation, "test": test}
    return {name: [*rows, *more[name]] for name, rows in plain.items()}


def test_examples_and_unusable_rows_are_counted(tmp_path):
    long = {"question": "q" * 99, "answer": "a"}
    data = config(tmp_path, three(train=[long, {"nothing": 1}, {"nothing": 2}]))
    reports, shared = check_data(data, processes=1)
    train = reports[0]
    assert (train.rows, train.examples, sum(train.reasons.values())) == (6, 6, 3)
    assert train.tokens_M.tolist() == [3 * len("^q0?/a0$"), 0, 0, 0]
    assert train.learned == 3 * len("a0$")
    assert [row for _, row, _ in train.unusable] == ["line 4", "line 5", "line 6"]
    assert [line.partition(" x ")[0] for line in reason_lines(reports)] == ["mine train: 2", "mine train: 1"]
    assert not shared
    require_clean(reports, shared)
    console = Console(file=io.StringIO(), width=120)
    print_tables([split_table(reports), unusable_table(reports)], console)
    assert "no column 'question'" in console.file.getvalue().replace("\n", " ")
    assert draw_lengths(reports, 64, tmp_path / "out" / "lengths.png").stat().st_size > 1000


LEAKS = {
    "equal": (three(test=[question(1)]), None, r"1 examples stand in two splits, first \S+test.jsonl line 4 \(test\)"),
    "the same words in another form": (
        three(test=[{"messages": [{"role": "user", "content": "q1?"}, {"role": "assistant", "content": "a1"}]}]),
        None,
        r"1 examples stand in two splits",
    ),
    "an empty split": ({"train": [question(0)], "test": [], "validation": [question(1)]}, None, r"split 'test'"),
    "nothing to use": (
        {"train": [question(0)], "test": [question(2)], "validation": [{"nothing": 1}]},
        None,
        r"no row of split 'validation' can be used",
    ),
}


@pytest.mark.parametrize(("splits", "near", "message"), LEAKS.values(), ids=LEAKS)
def test_an_empty_or_leaking_split_is_refused(splits, near, message, tmp_path):
    reports, shared = check_data(config(tmp_path, splits), processes=1, near=near)
    with pytest.raises(UserError, match=message):
        require_clean(reports, shared)


def test_near_duplicates_are_reported(tmp_path):
    splits = three(train=[{"text": WORDS}], test=[{"text": WORDS + " twelve"}, {"text": WORDS[::-1]}])
    reports, shared = check_data(config(tmp_path, splits), processes=1, near=0.7)
    (pair,) = shared
    assert (pair.near, pair.first[-6:], pair.second[-6:]) == (True, "line 4", "line 4")
    require_clean(reports, shared)
    assert shared_table(shared).rows[0][0] == "nearly"


def test_chunks_of_a_document_do_not_count_as_examples(tmp_path):
    head = "the same licence stands above every document of this corpus, word for word. "
    splits = {split: [{"text": head + split * 30}] for split in ("train", "validation", "test")}
    reports, shared = check_data(config(tmp_path, splits), processes=1)
    assert [report.cut for report in reports] == [1, 1, 1]
    assert not shared
