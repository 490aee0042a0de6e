"""Compares importance with loudness, chunk by chunk, in a run's test recordings.

python -m experiments.recordings.importance_and_loudness runs/spoken spoken
"""

import argparse
import pathlib

import jax
import numpy as np
from scipy.stats import spearmanr

from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.pipeline import eval_batches
from anyexperts_jax.evaluate.measure import run_at
from anyexperts_jax.evaluate.trained import load_trained, own_window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.add_argument("domain", help="of recordings")
    parser.add_argument("--examples", type=int, default=64, help="test recordings (default: 64)")
    options = parser.parse_args()
    trained = load_trained(options.run, "last")
    data, window = trained.config.data, own_window(trained.config.model.moe)
    sources = Sources(data)
    count = sources.count(options.domain, "test", options.examples)
    (batch,) = eval_batches(data, options.domain, "test", trained.whole_rows(count), count, sources=sources)
    output = run_at(trained, trained.config.model, batch, window)
    importance_BT = np.asarray(jax.device_get(output.trace.importance_BT)).mean(axis=0)
    correlations, loud, quiet = [], [], []
    for row in range(count):
        heard = importance_BT[row][np.asarray(batch.modality_BT[row]) == Modality.AUDIO]
        loudness = np.asarray(batch.frames_BSX[row][: len(heard)]).mean(axis=1)
        order = np.argsort(loudness)
        third = max(len(heard) // 3, 1)
        correlations.append(spearmanr(heard, loudness).statistic)
        quiet.append(heard[order[:third]].mean())
        loud.append(heard[order[-third:]].mean())
    print(f"{count} recordings, importance (mean of layers) against mean log-mel power of each chunk of 40 ms")
    print(f"rank correlation in a recording: mean {np.mean(correlations):.2f}, deviation {np.std(correlations):.2f}")
    print(f"mean importance: loudest third {np.mean(loud):.3f}, quietest third {np.mean(quiet):.3f}")


if __name__ == "__main__":
    main()
