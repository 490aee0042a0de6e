"""Compares time and memory of reading a checkpoint with a bare read of the same files by safetensors.

    python -m experiments.bench.pretrained_read [--gib 4] [--folder DIR] [--rounds 4]

Writes a Qwen3-MoE checkpoint of random bits in the hub's layout (DIR needs as much disk space), then reads it
alternately with the library alone (`load_file`, all tensors kept) and with `load_pretrained`, each in its own process
with the files in the page cache. Writes `experiments/results/pretrained_read.md`.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import ml_dtypes
import numpy as np

from anyexperts_jax.bench.output import environment, markdown
from anyexperts_jax.core.text_table import TextTable

RESULTS = pathlib.Path(__file__).parents[1] / "results"
GIB = 2**30
SHAPE = {  # Qwen3-30B-A3B with fewer layers and ids
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
_SHARD = GIB  # approximate bytes of a file
_LAYER = 128 * 3 * 2048 * 768 * 2  # bytes of a layer's experts


def write_checkpoint(folder: pathlib.Path, gib: float) -> None:
    """Writes a checkpoint of about this size, one layer of experts at a time."""
    from safetensors.numpy import save_file

    from anyexperts_jax.pretrained.family import family_of
    from anyexperts_jax.pretrained.hub_config import HubConfig
    from anyexperts_jax.pretrained.rules import expand, expected_tensors

    values = {**SHAPE, "num_hidden_layers": max(1, round(gib * GIB / _LAYER))}
    hub = HubConfig(values, "config.json")
    family = family_of(hub)[1]
    config = family.config(hub)
    shapes = {n: t.shape for n, t in expected_tensors(expand(family.rules(config, "each"), config)).items()}
    random, files, part, size = np.random.default_rng(0), {}, {}, 0
    folder.mkdir(parents=True, exist_ok=True)
    for last, (name, shape) in enumerate(shapes.items(), 1 - len(shapes)):
        part[name] = random.integers(0, 2**15, shape, np.uint16).view(ml_dtypes.bfloat16)
        size += part[name].nbytes
        if size >= _SHARD or last == 0:
            file = f"model-{len(set(files.values())):05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(part, file)
            part, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(values))


class Memory:
    """Samples this process's anonymous memory every 5 ms; gives the peak above the value at the start."""

    def __init__(self) -> None:
        self.most, self._before, self._ends = 0, anonymous(), threading.Event()
        self._watch = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ends.wait(0.005):
            self.most = max(self.most, anonymous() - self._before)

    def __enter__(self) -> "Memory":
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._watch.join()


def anonymous() -> int:
    """Returns the bytes of memory without a file behind them; the system can reclaim pages of a mapped file."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def bare(folder: pathlib.Path) -> dict[str, float]:
    """Reads every tensor of every file with the library alone and keeps them all."""
    from safetensors.numpy import load_file

    began = time.perf_counter()
    kept = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": sum(tensor.nbytes for file in kept for tensor in file.values())}


def ours(folder: pathlib.Path) -> dict[str, float]:
    """Runs `load_pretrained` until everything is on the device."""
    import jax

    from anyexperts_jax.pretrained.load import open_checkpoint
    from anyexperts_jax.pretrained.read import read_parameters

    jax.device_put(np.zeros(1)).block_until_ready()  # starts JAX before the clock
    with Memory() as memory:
        began = time.perf_counter()
        found = open_checkpoint(folder)
        plan = found.plan()
        planned = time.perf_counter()
        params = jax.block_until_ready(read_parameters(plan, found.source)[0])
        ended = time.perf_counter()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    times = {"seconds": ended - began, "reading": ended - planned, "planning": planned - began}
    return {**times, "bytes": sum(sizes), "largest": max(sizes), "memory": memory.most}


def measure(folder: pathlib.Path, rounds: int) -> tuple[list[dict], list[dict]]:
    """Measures both ways in turn, after a round that fills the page cache."""
    found: dict[str, list[dict]] = {"bare": [], "ours": []}
    for number in range(rounds + 1):
        for way in found:
            command = [sys.executable, "-m", __spec__.name, "--way", way, "--folder", str(folder)]
            one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{way}: {one['seconds']:.2f} s", file=sys.stderr, flush=True)
            if number:
                found[way].append(one)
    return found["bare"], found["ours"]


def table(theirs: list[dict], own: list[dict]) -> TextTable:
    size, largest, most = own[0]["bytes"], own[0]["largest"], max(one["memory"] for one in own)
    planning = statistics.median(o["planning"] / o["seconds"] for o in own)
    rows = (
        ("checkpoint, GiB", f"{size / GIB:.2f}", ""),
        ("speed over the bare read's", _ratios(theirs, own, "seconds"), "at least 0.60"),
        ("  without the plan, once the files' headers are checked", _ratios(theirs, own, "reading"), ""),
        ("  share of the time that the plan takes, whatever the size", f"{planning:.2f}", ""),
        ("largest parameter, GiB", f"{largest / GIB:.2f}", ""),
        ("most memory, GiB", f"{most / GIB:.2f}", f"at most {(size + largest) / GIB + 0.5:.2f}"),
    )
    return TextTable("Reading", ("what", "measured", "reach"), rows)


def _ratios(theirs: list[dict], own: list[dict], part: str) -> str:
    found = [b["seconds"] / o[part] * o["bytes"] / b["bytes"] for b, o in zip(theirs, own, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint (default: 4)")
    parser.add_argument("--folder", type=pathlib.Path, help="where it is written, and kept (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=4, help="of both ways in turn (default: 4)")
    parser.add_argument("--way", choices=("bare", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps({"bare": bare, "ours": ours}[options.way](options.folder)))
        return
    machine = environment(options.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        if not (folder / "config.json").is_file():
            print(f"writing {options.gib:g} GiB to {folder}", file=sys.stderr, flush=True)
            write_checkpoint(folder, options.gib)
        found = table(*measure(folder, options.rounds))
    command = f"python -m experiments.bench.pretrained_read --gib {options.gib:g} --rounds {options.rounds}"
    page = RESULTS / "pretrained_read.md"
    page.write_text(markdown("Reading a published checkpoint", command, machine, [found]) + NOTES)
    print(page.read_text())


NOTES = """
Memory is anonymous memory above that before the read, on a CPU, where the device's memory is the process's: the model
itself counts. Pages of the mapped files do not, for the system takes them back when it likes. Files are in the page
cache, for both ways.
"""

if __name__ == "__main__":
    main()
