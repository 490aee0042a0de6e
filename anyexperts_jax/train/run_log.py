"""The run's logs: metrics.jsonl and TensorBoard events, written during the run."""

import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.files import parse_json_object
from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.train.metrics import plain
from anyexperts_jax.train.run_dir import RunDir, write_whole


class NoLog:
    """Replaces `RunLog` in the processes that do not write logs."""

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """The records of a run, one JSON object per line, and the same numbers for TensorBoard.

    Opening at `step` drops later records, because a run that resumes from a checkpoint writes them again. Every write
    goes to the file at once, so that a full disk raises OSError where it happens.
    """

    def __init__(self, paths: RunDir, step: int) -> None:
        if paths.metrics.exists():
            kept = [json.dumps(record) + "\n" for record in read_records(paths.metrics) if record["step"] <= step]
            write_whole(paths.metrics, "".join(kept))
        self._file: IO[str] = open(paths.metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._events = _EventFile(paths.tensorboard, step)

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Writes one record: {"kind": kind, "step": step, **record}.

        Raises:
          OSError: if there is no disk space.
        """
        self._file.write(json.dumps({"kind": kind, "step": step, **plain(record)}) + "\n")
        self._events.write(step, kind, record)

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self._events.close()


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. An incomplete last line, as a killed run leaves it, is ignored.

    Raises:
      UserError: naming the first line that is not a record, or the file if it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    records = [_parse_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    for number, record in enumerate(records, start=1):
        step, kind = record.get("step"), record.get("kind")
        numbered = isinstance(step, int) and not isinstance(step, bool) and step >= 0
        require(numbered, f"{path}, line {number}: step={step!r} is not a step")
        require(isinstance(kind, str), f"{path}, line {number}: kind={kind!r} is not the name of a kind of record")
    return records


def _parse_record(line: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_json_object(line.decode(), name)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from error


class _EventFile:
    """A TensorBoard event file, written in the caller's thread. tensorboardX's SummaryWriter writes in its own thread,
    which a full disk ends without notice; later the run hangs on its full queue."""

    def __init__(self, directory: pathlib.Path, step: int) -> None:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        os.makedirs(directory, exist_ok=True)
        self._event = event_pb2.Event
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{step}"
        self._writer = RecordWriter(str(directory / name))
        self._put(file_version="brain.Event:2")
        if step > 0:  # tells TensorBoard to drop what it has read after this step
            self._put(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._writer.flush()

    def _put(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, step: int, kind: str, record: dict[str, Any]) -> None:
        from tensorboardX import summary

        histograms = record.get("importance_histogram")
        summaries = [summary.scalar(f"{kind}/{tag}", value) for tag, value in _scalars(record)]
        if histograms is not None:
            summaries += [summary.histogram_raw(f"{kind}/{tag}", **h) for tag, h in _histograms(histograms)]
        for each in summaries:
            self._put(step=step, summary=each)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The tag and value of every finite number; arrays are split by layer and modality."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and np.isfinite(value):
            yield f"{prefix}{name}", value
        elif isinstance(value, np.ndarray) and name != "importance_histogram":
            for index in np.argwhere(np.isfinite(value)):
                yield f"{prefix}{name}/{_place(name, index)}", float(value[tuple(index)])


def _place(name: str, index: np.ndarray) -> str:
    if name == "tokens":
        return MODALITY_NAMES[index[0]]
    layer = f"layer_{index[0]}"
    return layer if len(index) == 1 else f"{layer}/{MODALITY_NAMES[index[1]]}"


def _histograms(shares_LMX: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """TensorBoard histograms of importance, one for each layer and modality that has tokens."""
    bins = shares_LMX.shape[-1]
    middles = (np.arange(bins) + 0.5) / bins
    for layer, modality in np.argwhere(np.isfinite(shares_LMX).all(-1)):
        shares = shares_LMX[layer, modality]
        histogram = {
            "min": 0.0,
            "max": 1.0,
            "num": 1.0,
            "sum": float(shares @ middles),
            "sum_squares": float(shares @ middles**2),
            "bucket_limits": ((np.arange(bins) + 1) / bins).tolist(),
            "bucket_counts": shares.tolist(),
        }
        yield f"importance_histogram/layer_{layer}/{MODALITY_NAMES[modality]}", histogram
