"""Each TPU kernel takes no more of its chip than tests/golden/tpu_kernels.json says.

All of them are compiled here. CI compiles a third of them, every kernel for every chip at one of the shapes; the other
two shapes are marked slow. Without a compiler, tests/experiments/bench_kernels_test.py reads the entries.
After a change that is meant to cost something, `python -m experiments.bench.kernels --what ours` writes the file anew.
"""

import importlib.metadata
import itertools
import json
import pathlib

import pytest

from anyexperts_jax.aot import kernels
from anyexperts_jax.core.hardware import tpus
from experiments.bench import tpu_model, tpu_table
from experiments.bench.kernels import our_task
from experiments.bench.tune import static_ns

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "tpu_kernels.json").read_text())
# Other versions of libtpu schedule a little differently: a figure may be worse by this factor and this amount.
SLACK = {"vmem_bytes": (1.05, 0), "spills": (1.1, 200), "ns_per_row": (1.05, 0)}
OCCUPANCY_SLACK = 0.03
PROGRAMS = [
    pytest.param(chip, shape, kernel, marks=[] if (c + s + k) % len(kernels.SHAPES) == 0 else [pytest.mark.slow])
    for (c, chip), (s, shape), (k, kernel) in itertools.product(
        enumerate(tpus()), enumerate(kernels.SHAPES), enumerate(tpu_model.OURS)
    )
]


def regressions(golden, found):
    """One line for each figure that is worse in `found`."""
    worse = [
        f"{field} {golden[field]} -> {found[field]}"
        for field, (share, more) in SLACK.items()
        if found[field] > share * golden[field] + more
    ]
    if found["occupancy"] < golden["occupancy"] - OCCUPANCY_SLACK:
        worse.append(f"occupancy {golden['occupancy']} -> {found['occupancy']}")
    return worse


@pytest.mark.aot
@pytest.mark.parametrize(("chip", "shape", "kernel"), PROGRAMS)
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
    assert found["vmem_bytes"] <= tpus()[chip].limits.vmem_bytes
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
