"""The papers' own figures, copied with their source, for comparison. Their data and scale differ from ours."""

import csv
import importlib.resources


def _rows(name: str) -> list[dict[str, str]]:
    text = (importlib.resources.files(__name__) / f"{name}.csv").read_text()
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def audio_wer() -> dict[tuple[str, float], float]:
    """Returns AnyExperts' Table 1: word error rate in percent by kind ("dynamic", "static") and experts per token."""
    return {(row["kind"], float(row["experts_per_token"])): float(row["wer"]) for row in _rows("anyexperts_table1")}


def budget_scores() -> dict[tuple[str, str], dict[float, float]]:
    """Returns AnyExperts' Table 2: by domain and benchmark, the score at each budget (speech: word error rate)."""
    return {
        (row["domain"], row["benchmark"]): {8.0: float(row["avg_k_8.0"]), 7.2: float(row["avg_k_7.2"])}
        for row in _rows("anyexperts_table2")
    }


def ablation_scores() -> dict[tuple[str, str], dict[str, float]]:
    """Returns AnyExperts' Table 3: by domain and benchmark, the score of each ablation (speech: word error rate)."""
    return {
        (row["domain"], row["benchmark"]): {
            name: float(value) for name, value in row.items() if name not in ("domain", "benchmark")
        }
        for row in _rows("anyexperts_table3")
    }


def evomoe_scores() -> dict[str, float]:
    """Returns EvoMoE's components, routers and diversity on Qwen-1.8B: by row, the mean of its benchmarks.

    Components are the average the paper prints over its own, larger set of benchmarks.
    """
    found = {row["row"]: float(row["average"]) for row in _rows("evomoe_components")}
    for name in ("evomoe_routers", "evomoe_diversity"):
        for row in _rows(name):
            scores = [float(value) for key, value in row.items() if key != "row"]
            found[row["row"]] = sum(scores) / len(scores)
    return found
