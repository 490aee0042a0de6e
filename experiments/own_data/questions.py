"""Cuts questions and answers at random out of articles, as the rows that `anyexperts bench data` measures.

python -m experiments.own_data.questions runs/articles-data/train.jsonl runs/questions
"""

import argparse
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet

SIZES = {"short": (25, 15), "long": (100, 70)}  # words of a question and of its answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles", type=pathlib.Path, help="JSON Lines with a column text")
    parser.add_argument("folder", type=pathlib.Path, help="where to write short.parquet, long.parquet and short.jsonl")
    parser.add_argument("--count", type=int, default=2000, help="rows of each file (default: 2000)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(json.loads(line)["text"] for line in options.articles.read_text().splitlines()).split(" ")
    rng = np.random.default_rng(0)
    for name, (asked, answered) in SIZES.items():
        starts = rng.integers(0, len(words) - asked - answered, options.count).tolist()
        rows = [
            {
                "question": " ".join(words[start : start + asked]),
                "answer": " ".join(words[start + asked : start + asked + answered]),
            }
            for start in starts
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), options.folder / f"{name}.parquet")
        (options.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows of {asked} and {answered} words")


if __name__ == "__main__":
    main()
