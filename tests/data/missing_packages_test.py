"""Data that needs a package of an extra ends in one line that names the extra, where the package is not installed."""

import json
import sys

import pytest

from anyexperts_jax.cli import main as cli

ROWS = "\n".join(json.dumps({"question": f"say {i}", "answer": str(i)}) for i in range(40)).encode()
SOUNDS = "\n".join(json.dumps({"audio": "s.mp3", "text": str(i)}) for i in range(40)).encode()
FILMS = "\n".join(json.dumps({"video": "f.mp4", "question": "?", "answer": str(i)}) for i in range(40)).encode()
FILES = {
    "a.jsonl": ROWS,
    "a.jsonl.zst": b"\x28\xb5\x2f\xfd" + bytes(20),
    "a.parquet": b"PAR1" + bytes(20) + b"PAR1",
    "sounds.jsonl": SOUNDS,
    "s.mp3": b"ID3" + bytes(200),
    "films.jsonl": FILMS,
    "f.mp4": b"\0\0\0\x18ftypmp42" + bytes(200),
}


@pytest.mark.parametrize(
    ("package", "path", "extra"),
    [
        ("zstandard", "a.jsonl.zst", "data"),
        ("datasketch", "a.jsonl --near 0.8", "data"),
        ("pyarrow", "a.parquet", "datasets"),
        ("soundfile", "sounds.jsonl", "media"),
        ("av", "films.jsonl", "media"),
        ("fsspec", "s3://bucket/a.jsonl", "remote"),
        ("s3fs", "s3://bucket/a.jsonl", "remote"),
        ("gcsfs", "gs://bucket/a.jsonl", "remote"),
        ("tokenizers", "a.jsonl --set data.tokenizer=words", "text"),
    ],
)
def test_a_missing_package_ends_in_one_line_with_its_extra(package, path, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "words").mkdir()
    (tmp_path / "words/tokenizer.json").write_text("{}")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code = cli.main(["data", "check", "smoke", "--data", *f"mine={path}".split()])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert {"av": "PyAV"}.get(package, package) in said[-1]
    assert said[-1].endswith(f"pip install 'anyexperts-jax[{extra}]'")
