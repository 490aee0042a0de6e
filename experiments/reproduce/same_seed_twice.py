"""How far two runs of the same seed end apart on a GPU, where sums have no fixed order, beside two runs of other seeds.

    python experiments/reproduce/same_seed_twice.py

Of the reproduction's first attempt: reads the second runs in results/first_attempt/again.jsonl and the first in
runs.jsonl beside it; writes same_seed_twice.md.
"""

import itertools
import json
import pathlib
import statistics

from anyexperts_jax.core.text_table import TextTable
from experiments.reproduce.collect import load_kept, mean_score
from experiments.reproduce.output import markdown_table
from experiments.reproduce.run_result import RunResult, result_from_json

FOLDER = pathlib.Path(__file__).parents[1] / "results" / "first_attempt"
TITLE = "The same seed twice"


def apart(pairs: list[tuple[RunResult, RunResult]], domain: str | None) -> str:
    """Standard deviation of one run, in points, from the differences of pairs: root of half their mean square."""
    chosen = None if domain is None else (domain,)
    squares = [(mean_score(one, None, chosen) - mean_score(other, None, chosen)) ** 2 for one, other in pairs]
    return f"{100 * (statistics.fmean(squares) / 2) ** 0.5:.1f}"


def table(first: dict[str, RunResult], again: list[RunResult]) -> TextTable:
    """A row for pairs of one seed and one for pairs of two seeds, of the same variants."""
    same = [(first[one.id], one) for one in again]
    firsts = [one for one, _ in same]
    other = [(a, b) for a, b in itertools.combinations(firsts, 2) if a.name == b.name]
    domains = [score.domain for score in firsts[0].own.scores]
    rows = tuple(
        (name, str(len(pairs)), *(apart(pairs, domain) for domain in (*domains, None)))
        for name, pairs in (("the same seed", same), ("other seeds", other))
    )
    return TextTable(TITLE, ("standard deviation of", "pairs", *domains, "mean"), rows)


def main() -> None:
    lines = (FOLDER / "again.jsonl").read_text().splitlines()
    again = [result_from_json(line, "again.jsonl") for line in lines]
    assert json.loads(lines[0])["device"] != "cpu", "on a CPU the second run is the first, bit for bit"
    made = table(load_kept(FOLDER), again)
    text = (
        f"# {TITLE}\n\n`python experiments/reproduce/same_seed_twice.py`\n\n"
        f"{len(again)} runs were made twice on {again[0].device}, with the same data and the same first parameters. "
        "Sums on a GPU have no fixed order, and training makes two models of it. Standard deviation of one run's "
        "score, in points:\n\n"
        f"{markdown_table(made)}\n"
    )
    path = FOLDER / "same_seed_twice.md"
    path.write_text(text)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
