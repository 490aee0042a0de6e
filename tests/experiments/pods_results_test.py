"""Checks the committed results of the 16B model on pods."""

import json
import pathlib

import pytest

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
STEPS = sorted((RESULTS / "pods").glob("*.json"))


def table(title):
    """Returns the rows of a table of pods.md as dictionaries."""
    lines = (RESULTS / "pods.md").read_text().split(f"## {title}")[1].split("\n## ")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_every_pod_leaves_memory_free(path):
    step = json.loads(path.read_text())
    assert step["free"] >= 0.15
    assert step["free"] == pytest.approx(1 - sum(step["memory"].values()) / step["hbm"])
    bounds = step["bounds"]
    assert step["bound"] == max(bounds[name] for name in ("arithmetic", "hbm", "network", "between_slices"))


def test_bytes_exchanged_and_expert_flops_fall_with_the_budget():
    rows = [row for row in table("Static top-8") if not row["budget"].startswith("static")]
    for pod in {row["pod"] for row in rows}:
        own = sorted((float(row["budget"]), row) for row in rows if row["pod"] == pod)
        for column in ("all-to-all, GiB", "expert TFLOP, real"):
            figures = [float(row[column].replace(",", "")) for _, row in own]
            assert figures == sorted(set(figures))
            assert len(figures) == 4
        assert figures[0] / figures[-1] == pytest.approx(0.6, abs=0.001)  # 4.8 of 8.0


def test_a_chips_share_of_the_state_halves_as_chips_double():
    rows = table("Scaling")
    assert [int(row["devices"]) for row in rows] == [16, 64, 128, 256, 512, 1024, 2048]
    share = [float(row["state, GiB"]) * int(row["devices"]) for row in rows]
    assert share == pytest.approx([share[0]] * len(share), rel=0.03)
