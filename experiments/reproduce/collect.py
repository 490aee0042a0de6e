"""Collects the results of an experiment's runs by variant and seed, and pairs figures by seed."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from anyexperts_jax.train.run_dir import write_whole
from experiments.reproduce.experiment import Run
from experiments.reproduce.run_result import RESULT_NAME, RunResult, load_result, result_from_json, result_to_json

KEPT_NAME = "runs.jsonl"  # a result per line, next to the tables made from them


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one experiment so far; missing ones make a table with fewer seeds."""

    found: Mapping[tuple[str, int], RunResult]  # by variant and seed
    missing: tuple[tuple[str, int], ...] = ()
    older: tuple[tuple[str, int], ...] = ()  # of `found`, made by an older version of the code or of its defaults

    def has(self, *variants: str) -> bool:
        """Returns whether each variant has a result of at least one seed."""
        return all(any(name == variant for name, _ in self.found) for variant in variants)

    def seeds(self, *variants: str) -> list[int]:
        """Returns the seeds that all of `variants` have, and in which they continued from the same shared weights.

        A start that was trained twice, as on two machines, counts as two: runs from them differ by chance like seeds.
        """
        sets = [{seed for name, seed in self.found if name == variant} for variant in variants]
        common = sorted(set.intersection(*sets)) if sets else []
        return [seed for seed in common if _one_origin(self.found[variant, seed] for variant in variants)]

    @property
    def apart(self) -> list[int]:
        """Returns the seeds whose runs continued from several trainings of one start; only runs of one are paired."""
        seeds = sorted({seed for _, seed in self.found})
        return [s for s in seeds if not _one_origin(one for (_, seed), one in self.found.items() if seed == s)]

    def paired(self, variants: Sequence[str], figure: Callable[..., float]) -> list[float]:
        """Returns `figure` of the variants' results of one seed, for each seed that all have."""
        return [figure(*(self.found[name, seed] for name in variants)) for seed in self.seeds(*variants)]


def _one_origin(results: Iterable[RunResult]) -> bool:
    """Returns whether results that continued from a start of one name continued from the same training of it."""
    known = {one.origin for one in results if one.origin is not None}
    return len(known) == len({origin.partition(":")[0] for origin in known})


def collect(runs: Mapping[tuple[str, int], Run], root: pathlib.Path, kept: Mapping[str, RunResult]) -> Results:
    """Returns results from the runs' folders under `root`, or else from `kept` by id, or else by the older id.

    Raises:
      UserError: if a result.json was not written by this version.
    """
    found, missing, older = {}, [], []
    for key, run in runs.items():
        path = root / run.id / RESULT_NAME
        if path.exists():
            found[key] = load_result(path)
        elif run.id in kept:
            found[key] = kept[run.id]
        elif run.older_id in kept:
            found[key] = kept[run.older_id]
            older.append(key)
        else:
            missing.append(key)
    return Results(found, tuple(missing), tuple(older))


def load_kept(folder: pathlib.Path) -> dict[str, RunResult]:
    """Returns the results in `folder`/runs.jsonl by id; an empty dict without that file.

    Raises:
      UserError: if a line is not a result of this version.
    """
    path = folder / KEPT_NAME
    if not path.exists():
        return {}
    results = [result_from_json(line, f"{path}, line {i}") for i, line in enumerate(path.read_text().splitlines(), 1)]
    return {result.id: result for result in results}


def save_kept(results: Mapping[str, RunResult], folder: pathlib.Path) -> pathlib.Path:
    """Writes the results to `folder`/runs.jsonl, sorted by name and seed."""
    ordered = sorted(results.values(), key=lambda one: (one.name, one.seed, one.id))
    path = folder / KEPT_NAME
    write_whole(path, "".join(json.dumps(result_to_json(one)) + "\n" for one in ordered))
    return path


def mean_score(result: RunResult, budget: float | None = None, domains: Sequence[str] | None = None) -> float:
    """Returns the mean score over domains at a budget; None stands for all domains, and for the trained budget."""
    scores = (result.at(budget) if budget is not None else result.own).scores
    chosen = [score.score for score in scores if domains is None or score.domain in domains]
    return sum(chosen) / len(chosen)
