"""Makes questions about two pictures each, as chats in transformers' format: docs/guides/two_pictures.md.

python -m experiments.own_data.two_pictures runs/pictures
"""

import argparse
import json
import pathlib

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 210, 60)}
SIDE, SQUARE = 24, 8  # pixels


def draw(rng: np.random.Generator, colour: str, path: pathlib.Path) -> list[int]:
    """Writes a square on grey noise, and returns its box: left, top, right, bottom."""
    pixels = rng.integers(90, 166, (SIDE, SIDE, 1)).repeat(3, axis=-1).astype(np.uint8)
    left, top = (int(edge) for edge in rng.integers(0, SIDE - SQUARE + 1, 2))
    pixels[top : top + SQUARE, left : left + SQUARE] = COLOURS[colour]
    Image.fromarray(pixels).save(path)
    return [left, top, left + SQUARE, top + SQUARE]


def row(rng: np.random.Generator, number: int, folder: pathlib.Path) -> dict[str, object]:
    """Makes one question: which colours the squares have, in order, or whether they are the same."""
    kind = ("colours", "same")[number % 2]
    first, second = (str(name) for name in rng.choice(list(COLOURS), 2))
    second = first if kind == "same" and number % 4 == 1 else second
    parts: list[dict[str, object]] = []
    for place, colour in enumerate((first, second)):
        name = f"pictures/{number}_{place}.png"
        parts.append({"type": "image", "path": name, "evidence": [draw(rng, colour, folder / name)]})
    parts.append({"type": "text", "text": "Which colours?" if kind == "colours" else "The same colour?"})
    answer = f"{first}, {second}" if kind == "colours" else "yes" if first == second else "no"
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"question_type": kind, "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where to write chats.jsonl and pictures/")
    parser.add_argument("--count", type=int, default=2400, help="questions (default: 2400)")
    options = parser.parse_args()
    (options.folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [json.dumps(row(rng, number, options.folder)) for number in range(options.count)]
    (options.folder / "chats.jsonl").write_text("\n".join(rows) + "\n")
    print(f"{options.folder / 'chats.jsonl'}: {len(rows)} questions about two pictures each")


if __name__ == "__main__":
    main()
