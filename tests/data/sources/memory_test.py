"""A corpus ten times as long needs the same peak memory: rows are read by number, indices are kept on disk."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
ROWS, BYTES = 4_000, 2_000  # the short corpus has 8 MB, the long one 80
ALLOWED = 12e6  # bytes: a sixth of the 72 MB between the two, for the allocator and a few numbers per row

# Opens the corpus, reads every row in a random order and prints the peak memory. It writes nothing but an index.
READER = """
import resource, sys
import numpy as np
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.mixture import Sources
sources = Sources(DataConfig(domains=("mine",), folders=("mine=" + sys.argv[1],), threads=0))
source = sources.open("mine", "train")
for index in np.random.default_rng(0).permutation(len(source)):
    source[int(index)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
# Writes the corpus in a process of its own, so that writing does not count.
WRITER = """
import io, json, random, sys, tarfile
kind, path, rows, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def row(i):
    return {"question": "q", "answer": random.Random(i).randbytes(size // 2).hex()}
if kind == "jsonl":
    with open(path, "w") as file:
        for i in range(rows):
            file.write(json.dumps(row(i)) + "\\n")
elif kind == "parquet":  # in one row group
    import pyarrow, pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(i) for i in range(rows)]), path, row_group_size=rows)
else:
    with tarfile.open(path, "w") as tar:
        for i in range(rows):
            data = json.dumps(row(i)).encode()
            member = tarfile.TarInfo(f"{i:07d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
"""


def run(program, *words):
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_peak_memory_is_flat_over_a_corpus_ten_times_as_long(kind, tmp_path):
    peaks = []
    for rows in (ROWS, 10 * ROWS):
        path = tmp_path / f"{rows}.{kind}"
        run(WRITER, kind, path, rows, BYTES)
        assert path.stat().st_size > rows * BYTES / 2, json.dumps(rows)
        peaks.append(int(run(READER, path)))
    assert peaks[1] - peaks[0] < ALLOWED, f"{peaks[0] / 1e6:.0f} MB and {peaks[1] / 1e6:.0f} MB"
