"""Damaged logs and evaluations: one line that names the file, or a page of what can be read."""

import copy
import json
import random
import shutil

import pytest
from evaluate.stand_in import MODEL, config_of, write_records

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evaluate.results import JSON_NAME, load_evaluation, save_evaluation
from anyexperts_jax.report.page import report
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.log_shape import require_complete
from anyexperts_jax.train.run_dir import RunDir, open_run_dir
from anyexperts_jax.train.run_log import read_records
from report.report_test import evaluation


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with records and an evaluation but without checkpoints."""
    root = tmp_path_factory.mktemp("runs") / "run"
    paths, _ = open_run_dir(root, config_of(MODEL))
    write_records(paths)
    save_evaluation(evaluation(), root)
    return root


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def read(root):
    """Reads everything that a page is made from."""
    records = read_records(RunDir(root).metrics)
    require_complete(records, RunDir(root).metrics)
    return records, load_evaluation(root)


def refusal(reads, path):
    """The message that rejects a file; None if it is accepted."""
    try:
        reads(path)
    except UserError as error:
        return str(error)
    return None


def refuses(root, said):
    with pytest.raises(UserError, match=said) as error:
        read(root)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=said):
        report(root)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"5\n", r"metrics\.jsonl, line 6: not a JSON object"),
        (b"[]\n", r"line 6: not a JSON object"),
        (b"nonsense\n", r"line 6: not valid JSON"),
        (b"\n", r"line 6: not valid JSON"),
        (b'"\xff"\n', r"line 6: not UTF-8 text"),
        ('{"kind": "train", "step": 1}\n'.encode("utf-16"), r"line 6: not UTF-8 text"),
        (b'{"kind": "train"}\n', r"line 6: step=None is not a step"),
        (b'{"kind": "train", "step": "1"}\n', r"line 6: step='1' is not a step"),
        (b'{"kind": "train", "step": true}\n', r"line 6: step=True is not a step"),
        (b'{"kind": 3, "step": 1}\n', r"line 6: kind=3 is not the name of a kind of record"),
        (b'{"kind": "train", "step": 9}\n', r"record of kind 'train' at step 9: answer_loss is not what a run"),
        (b'{"kind": "validation", "step": 9, "loss": 1}\n', r"at step 9: domains is not what a run of this version"),
    ],
)
def test_an_invalid_line_of_the_log_is_named(run, line, said):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line)
    refuses(run, said)


def test_records_of_other_kinds_are_kept_and_a_line_cut_short_is_ignored(run):
    before = read_records(RunDir(run).metrics)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "mine", "step": 2, "more": [1]}\n{"kind": "train", "st\xff')
    assert read(run)[0] == [*before, {"kind": "mine", "step": 2, "more": [1]}]


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe{\x00", b'{"step": 4}', b'{"step": "4"}', b"[" * 100_000]
)
def test_an_invalid_evaluation_is_named(run, text):
    (run / JSON_NAME).write_bytes(text)
    refuses(run, rf"{run}/{JSON_NAME} is not")


def places(value, path=()):
    """Every value in a tree of JSON, by its path."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places(below, (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    if not path:
        return new
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


OTHERS = (None, True, -1, 2.5, "text", [], {}, [[]], {"a": 1}, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("file", [JSON_NAME, "metrics.jsonl"])
def test_a_value_of_another_kind_is_read_or_refused_in_one_line(run, file):
    """Replaces each of two hundred values of the file by one of another kind: it is read, or rejected in one line."""
    path, draw = run / file, random.Random(0)
    lines = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
    said = []
    for _ in range(200):
        at = draw.randrange(len(lines))
        value = json.loads(lines[at])
        text = json.dumps(changed(value, draw.choice(list(places(value))), draw.choice(OTHERS)))
        path.write_text("\n".join([*lines[:at], text, *lines[at + 1 :]]) + "\n")
        said.append(refusal(read, run))
    refused = [line for line in said if line is not None]
    assert len(refused) > (100 if file == JSON_NAME else 10)
    assert not [line for line in refused if file not in line or "\n" in line]


@pytest.mark.parametrize("file", [JSON_NAME, "metrics.jsonl", "config.json"])
def test_a_flipped_bit_is_read_or_refused_in_one_line(run, file):
    path, draw = run / file, random.Random(1)
    data = path.read_bytes()
    for _ in range(150):
        broken = bytearray(data)
        broken[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken[: draw.choice((None, draw.randrange(len(data))))])
        said = refusal(load_config, path) if file == "config.json" else refusal(read, run)
        assert said is None or (str(path) in said and "\n" not in said)


@pytest.mark.slow
def test_accepted_files_can_be_rendered(run):
    """Files with one value of another kind that are accepted can all be rendered."""
    draw, drawn = random.Random(2), 0
    texts = {name: (run / name).read_text() for name in (JSON_NAME, "metrics.jsonl")}
    while drawn < 4:
        name = draw.choice(list(texts))
        lines = texts[name].splitlines() if name.endswith("l") else [texts[name]]
        at = draw.randrange(len(lines))
        value = json.loads(lines[at])
        text = json.dumps(changed(value, draw.choice(list(places(value))), draw.choice(OTHERS)))
        (run / name).write_text("\n".join([*lines[:at], text, *lines[at + 1 :]]) + "\n")
        if refusal(read, run) is None:
            assert report(run).exists(), f"{name} with {text}"
            drawn += 1
        (run / name).write_text(texts[name])
