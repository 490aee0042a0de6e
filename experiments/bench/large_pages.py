"""Times the demo's train step with and without large pages, alternately. Minutes on two cores.

    python -m experiments.bench.large_pages

`anyexperts` asks glibc for large pages itself (see `anyexperts_jax.__main__`); here an environment variable decides.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from anyexperts_jax.__main__ import LARGE_PAGES
from anyexperts_jax.core.versions import device_text, versions

COMMAND = "python -m experiments.bench.large_pages"
RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "large_pages.md"
ROUNDS, STEPS, VALUE = 4, 60, LARGE_PAGES["GLIBC_TUNABLES"]


def step_seconds(tunables: str) -> float:
    """Trains the demo's configuration and returns the median step time of the last sixth of the run."""
    with tempfile.TemporaryDirectory() as run:
        never = [f"train.{name}={2 * STEPS}" for name in ("eval_every", "checkpoint_every")]
        settings = [word for setting in (f"train.steps={STEPS}", *never) for word in ("--set", setting)]
        command = [sys.executable, "-m", "anyexperts_jax", "train", "tiny", "--run", run, *settings]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "GLIBC_TUNABLES": tunables})
        records = map(json.loads, (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines())
        return [one["step_seconds"]["median"] for one in records if one["kind"] == "train"][-1]


def main() -> None:
    rounds = []
    for number in range(ROUNDS):
        rounds.append((step_seconds(""), step_seconds(VALUE)))
        print(
            f"round {number + 1} of {ROUNDS}: {' and '.join(f'{1e3 * one:.0f} ms' for one in rounds[-1])}", flush=True
        )
    small, large = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(large / small for small, large in rounds)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    RESULT.write_text(
        f"# Large pages\n\n`{COMMAND}`\n\n{os.cpu_count()} CPU cores, {device_text()}; {packages}. The step of "
        f"`anyexperts train tiny`, medians of {ROUNDS} rounds of both in turn.\n\n"
        "| pages | GLIBC_TUNABLES | ms | over 4 KiB |\n|---|---|---|---|\n"
        f"| 4 KiB | empty | {small:.0f} | 1.00 |\n"
        f"| large where the kernel has them | {VALUE} | {large:.0f} | {ratio:.2f} |\n"
    )
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
