"""Splits a text of consecutive articles into three splits of whole articles: docs/guides/articles.md.

python -m experiments.own_data.articles PATH runs/articles

The text is WikiText's: a line " = Title = " begins each article. Of every ten articles one is for validation, one for
test.
"""

import argparse
import gzip
import json
import pathlib
import re

TITLE = re.compile(r"^ = [^=].* = \n$")


def read_articles(path: pathlib.Path) -> list[str]:
    """Returns the articles in order, each with its title."""
    opened = gzip.open if path.suffix == ".gz" else open
    articles: list[list[str]] = []
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if TITLE.match(line):
                articles.append([])
            if articles:
                articles[-1].append(line)
    return ["".join(article) for article in articles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path, help="the text, also compressed as .gz")
    parser.add_argument("folder", type=pathlib.Path, help="where to write a .jsonl for each split")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    articles = read_articles(options.text)
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, article in enumerate(articles):
        splits[{0: "validation", 1: "test"}.get(number % 10, "train")].append(article)
    for split, texts in splits.items():
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (options.folder / f"{split}.jsonl").write_text("".join(rows))
        print(f"{split}: {len(texts)} articles, {sum(len(text.encode()) for text in texts):,} bytes")
    print("train.txt: the articles of train as text, for a tokenizer")
    (options.folder.parent / f"{options.folder.name}.train.txt").write_text("".join(splits["train"]))


if __name__ == "__main__":
    main()
