"""Each TPU kernel takes no more of its chip than tests/golden/tpu_kernels.json says.

A subset is compiled here; tests/experiments/bench_kernels_test.py reads every entry. After a change that is meant to
cost something, `python -m experiments.bench.kernels --what ours` writes the file anew.
"""

import importlib.metadata
import json
import pathlib

import pytest

from anyexperts_jax.aot import kernels
from anyexperts_jax.ops.expert_mlp.tpu_sizes import CHIPS
from experiments.bench import tpu_table
from experiments.bench.kernels import our_task
from experiments.bench.tune import static_ns

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "tpu_kernels.json").read_text())
# Other versions of libtpu schedule a little differently; the share that a figure may be worse, and what is added.
SLACK = {"vmem_bytes": (1.05, 0), "spills": (1.1, 200), "ns_per_row": (1.05, 0)}
OCCUPANCY_SLACK = 0.03
COMPILED = [  # each chip, shape and kernel at least once
    ("v5e", "P", "forward"),
    ("v5e", "A", "weights"),
    ("v5p", "P", "backward"),
    ("v6e", "A", "forward"),
    ("v6e", "B", "forward_kept"),
    ("tpu7x", "P", "forward"),
    ("tpu7x", "B", "weights"),
]


def regressions(golden, found):
    """What is worse in `found`, a line each."""
    worse = [
        f"{field} {golden[field]} -> {found[field]}"
        for field, (share, more) in SLACK.items()
        if found[field] > share * golden[field] + more
    ]
    if found["occupancy"] < golden["occupancy"] - OCCUPANCY_SLACK:
        worse.append(f"occupancy {golden['occupancy']} -> {found['occupancy']}")
    return worse


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape", "kernel"), COMPILED)
def test_takes_no_more_than_the_golden_file_says(chip, shape, kernel, schedules):
    sizes = tpu_table.sizes_for(chip, kernels.SHAPES[shape])
    summary = our_task(chip, shape, kernel, sizes).compile(schedules)
    assert "passes" in summary, summary
    found = {
        "vmem_bytes": summary["vmem_bytes"],
        "spills": summary["spills"],
        "occupancy": summary["passes"][-1]["occupancy"],
        "ns_per_row": static_ns(chip, shape, kernel, sizes, summary),
    }
    assert found["vmem_bytes"] <= CHIPS[chip].vmem_bytes
    worse = regressions(GOLDEN["kernels"][chip][shape][kernel], found)
    assert not worse, (
        f"{chip}/{shape}/{kernel} with libtpu {importlib.metadata.version('libtpu')} is worse than with "
        f"{GOLDEN['versions']['libtpu']}: {'; '.join(worse)}. If that is meant: {GOLDEN['command']} --what ours"
    )


def test_a_regression_is_found_and_noise_is_not():
    golden = {"vmem_bytes": 10**7, "spills": 1000, "occupancy": 0.95, "ns_per_row": 40.0}
    assert not regressions(golden, golden | {"spills": 1299, "occupancy": 0.93, "ns_per_row": 41.9})
    assert not regressions(golden, golden | {"vmem_bytes": 1, "spills": 0, "occupancy": 1.0, "ns_per_row": 1.0})
    for field, value in (("vmem_bytes", 11 * 10**6), ("spills", 1400), ("ns_per_row", 43.0), ("occupancy", 0.91)):
        (line,) = regressions(golden, golden | {field: value})
        assert line == f"{field} {golden[field]} -> {value}"


def test_every_chip_shape_and_kernel_is_compiled_by_one_test():
    for place, names in enumerate((CHIPS, kernels.SHAPES, ("forward", "forward_kept", "backward", "weights"))):
        assert {case[place] for case in COMPILED} == set(names)
