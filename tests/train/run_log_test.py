import contextlib
import json
import resource

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_log import RunLog, read_records

RECORD = {
    "loss": 1.5,
    "real_slots": np.asarray([[2.0, np.nan, 3.0, 4.0]]),
    "tokens": np.asarray([5.0, 0, 1, 1]),
    "load_max_over_mean": np.asarray([1.25]),
    "importance_histogram": np.asarray([[[0.5, 0.5], [np.nan, np.nan], [1.0, 0.0], [0.0, 1.0]]]),
    "domains": {"nlp": {"exact_match": 0.25}},
}


def events(directory):
    """Every event of a directory's files, in order."""
    found = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event()
            event.ParseFromString(data[12 : 12 + length])
            found.append(event)
            data = data[16 + length :]
    return found


def test_records_are_json_lines_and_tensorboard_events(tmp_path):
    log = RunLog(RunDir(tmp_path), 0)
    log.write("train", 5, RECORD)
    (record,) = read_records(tmp_path / "metrics.jsonl")  # on disk at once
    assert (record["kind"], record["step"], record["real_slots"]) == ("train", 5, [[2.0, None, 3.0, 4.0]])
    written = {e.summary.value[0].tag: e for e in events(tmp_path / "tensorboard") if e.summary.value}
    log.close()
    scalars = {tag: e.summary.value[0].simple_value for tag, e in written.items() if "histogram" not in tag}
    assert scalars == {
        "train/loss": 1.5,
        "train/real_slots/layer_0/text": 2.0,
        "train/real_slots/layer_0/audio": 3.0,
        "train/real_slots/layer_0/video": 4.0,
        "train/tokens/text": 5.0,
        "train/tokens/image": 0.0,
        "train/tokens/audio": 1.0,
        "train/tokens/video": 1.0,
        "train/load_max_over_mean/layer_0": 1.25,
        "train/domains/nlp/exact_match": 0.25,
    }
    histograms = {tag: e.summary.value[0].histo for tag, e in written.items() if "histogram" in tag}
    assert {tag.rsplit("/", 1)[1] for tag in histograms} == {"text", "audio", "video"}
    assert list(histograms["train/importance_histogram/layer_0/audio"].bucket) == [1.0, 0.0]
    assert all(event.step == 5 for event in written.values())


def test_a_log_opened_again_drops_what_comes_after_its_step(tmp_path):
    log = RunLog(RunDir(tmp_path), 0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # a killed run's last line
    log = RunLog(RunDir(tmp_path), 2)
    log.write("train", 3, {"loss": 30.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_records(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    starts = [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert starts == [3]  # TensorBoard drops what it has of step 3 on


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\nnot json\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        read_records(path)


@contextlib.contextmanager
def no_room():
    """Limits files of this process to 1000 bytes; inside a test only, because pytest may write longer ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "record", [{"text": "x" * 2000}, {f"number_{i}": 1.0 for i in range(40)}], ids=["json", "events"]
)
def test_a_full_disk_shows_at_the_write(tmp_path, record):
    """The second record fits into metrics.jsonl and not into the event file."""
    log = RunLog(RunDir(tmp_path), 0)
    with no_room():
        with pytest.raises(OSError, match="File too large"):
            log.write("train", 1, record)
        with contextlib.suppress(OSError):
            log.close()
