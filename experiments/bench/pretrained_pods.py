"""Qwen3-30B-A3B and Qwen3-VL-30B-A3B with attached slots on one host: compiles what is missing, writes the page.

    python -m experiments.bench.pretrained_pods [--only NAME ...]    with libtpu, for h100 the GPU compilers; hours

Nothing is run. Each program is what `anyexperts compile CONFIG --topology ...` compiles, and its figures are kept in
`experiments/results/pretrained_pods`; the page is `experiments/results/pretrained_pods.md`.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
from typing import Any

import jax

from anyexperts_jax.aot.decode import compile_decode
from anyexperts_jax.aot.published import Slots, published_run
from anyexperts_jax.aot.step import compile_step
from anyexperts_jax.aot.step_tables import mesh_text, to_json
from anyexperts_jax.aot.topology import use_no_device
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.text_table import TextTable

ROOT = pathlib.Path(__file__).parents[1]
PAGE, KEPT = ROOT / "results" / "pretrained_pods.md", ROOT / "results" / "pretrained_pods"
SLOTS = Slots(k_min=8, k_max=12, num_virtual=64)
GIB = 2**30
MODELS = {"qwen3_30b_a3b": "Qwen3-30B-A3B", "qwen3_vl_30b_a3b": "Qwen3-VL-30B-A3B"}
DEVICES = {"v5p:2x2x1": 4, "v6e:2x4": 8, "tpu7x:2x2x1": 8, "h100:1x8": 8}
LENGTH, DECODED_ROWS = 4096, 64
TRAINED = ("**/router/**", "**/importance/**", "**/strength")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program."""

    model: str
    step: str  # train or decode
    topology: str

    @property
    def name(self) -> str:
        return f"{self.model}_{self.step}_{self.topology.replace(':', '_')}"

    @property
    def overrides(self) -> list[str]:
        if self.step == "decode":
            return [
                "mesh.tensor=4",
                f"train.batch_size={DECODED_ROWS}",
                f"data.encoding.max_length={LENGTH}",
            ]
        devices = DEVICES[self.topology]
        return [
            "mesh.data=1",
            f"mesh.expert={devices}",
            f"train.batch_size={devices}",
            f"data.encoding.max_length={LENGTH}",
            f"train.trainable={json.dumps(TRAINED)}",
            "model.stack.param_dtype=bfloat16",
            "model.stack.remat=full",
            "model.stack.execution.dispatch=exchange",
        ]

    @property
    def command(self) -> str:
        slots = ["--k-min", f"{SLOTS.k_min:g}", "--k-max", f"{SLOTS.k_max:g}", "--virtual", str(SLOTS.num_virtual)]
        words = ["anyexperts", "compile", f"experiments/pods/{self.model}", "--topology", self.topology, *slots]
        words += ["--decode"] if self.step == "decode" else []
        return shlex.join([*words, *(word for setting in self.overrides for word in ("--set", setting))])

    def compile(self) -> dict[str, Any]:
        source = str(ROOT / "pods" / self.model)
        found = published_run(source, self.overrides, SLOTS, trains=self.step == "train")
        if self.step == "decode":
            return to_json(compile_decode(found.run, found.model, self.topology))
        return to_json(compile_step(found.run, self.topology))


CASES = [Case(model, step, topology) for step in ("train", "decode") for topology in DEVICES for model in MODELS]


def read(case: Case) -> dict[str, Any] | None:
    path = KEPT / f"{case.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def memory_table(step: str, title: str) -> TextTable:
    held = ("state and batch", "temporaries") if step == "train" else ("parameters", "cache", "temporaries")
    head = ("model", "pod", "devices", "mesh", *(f"{name}, GiB" for name in held), "free", "compiled in, s")
    rows = []
    for case in (case for case in CASES if case.step == step):
        found = read(case)
        if found is None:
            continue
        if "refused" in found:
            rows.append(
                (MODELS[case.model], case.topology, str(DEVICES[case.topology]), "-", *["-"] * len(held), "no", "-")
            )
            continue
        sizes = [f"{found['memory'][name] / GIB:.2f}" for name in held]
        figures = (mesh_text(found["mesh"]), *sizes, f"{found['free']:.1%}", f"{found['seconds']:.0f}")
        rows.append((MODELS[case.model], case.topology, str(found["devices"]), *figures))
    return TextTable(title, head, tuple(rows), names=2)


def bounds_table(step: str, title: str) -> TextTable:
    head = ("model", "pod", "arithmetic, ms", "HBM, ms", "network, ms", "the largest, ms")
    rows = []
    for case in (case for case in CASES if case.step == step):
        found = read(case)
        if found is None or "refused" in found:
            continue
        times = [found["bounds"][name] for name in ("arithmetic", "hbm", "network")]
        rows.append((MODELS[case.model], case.topology, *(f"{1e3 * s:.2f}" for s in (*times, max(times)))))
    return TextTable(title, head, tuple(rows), names=2)


NOTES = """\
`python -m experiments.bench.pretrained_pods`, with {versions}. **Static: every figure is read from a compiler or
counted; nothing was run, no weight was read and no time was measured.** Configurations:
[Qwen3-30B-A3B](../pods/qwen3_30b_a3b/config.json), [Qwen3-VL-30B-A3B](../pods/qwen3_vl_30b_a3b/config.json), as
published. Slots are attached: {k_min:g} to {k_max:g} of 128 experts, {virtual} virtual ones, 8.0 real experts a token
in the mean. Programs are those of `anyexperts compile`, for one host each:

- *Training step*: routers, importance and strength train, the base is frozen in bfloat16; a sequence of {length} text
  tokens a device, experts split over all devices (`dispatch="exchange"`), everything rematerialised. Of the model that
  sees it is the decoder on text: towers are not trained here.
- *Decoding step*: a token for each of {rows} rows with a cache of {length} positions, heads and the width of every
  expert split over four devices, rows over the rest. The vision tower's parameters count; it does not run in it.
- A bound is the least time that the arithmetic, the memory traffic that cannot be avoided, or the links leave, at the
  peaks in `anyexperts_jax/core/hardware.toml`, each as if nothing else took time. A decoding step reads the experts
  that its rows hit, if rows choose at random, and the whole cache; a training step's state, the frozen base too, counts
  as read and written once.

Commands, one for each program:
"""


def page() -> str:
    found = [(case, read(case)) for case in CASES]
    first = next(own for _, own in found if own is not None and "versions" in own)
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "jaxlib"))
    about = {"k_min": SLOTS.k_min, "k_max": SLOTS.k_max, "virtual": SLOTS.num_virtual}
    text = ["# Published mixtures of 30B on one host", ""]
    text += [NOTES.format(versions=versions, **about, length=LENGTH, rows=DECODED_ROWS), "```bash"]
    text += [*(case.command for case, own in found if own is not None), "```", ""]
    absent = [case.name for case, own in found if own is None]
    if absent:
        text += [f"Not compiled yet: {', '.join(absent)}.", ""]
    refused = [(case, own["refused"]) for case, own in found if own is not None and "refused" in own]
    text += [f"- {case.name}: {why}" for case, why in refused] + ([""] if refused else [])
    for step, name in (("train", "training step"), ("decode", "decoding step")):
        memory = memory_table(step, f"Memory of a device, {name}")
        for table in (memory, bounds_table(step, f"Bounds, {name}")):
            head, *body = ("| " + " | ".join(row) + " |" for row in (table.columns, *table.rows))
            text += [f"## {table.title}", "", head, "|---" * len(table.columns) + "|", *body, ""]
    return "\n".join(text).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="compile these alone (default: all that are missing)")
    options = parser.parse_args()
    use_no_device()
    KEPT.mkdir(exist_ok=True)
    for case in CASES:
        if read(case) is not None or (options.only is not None and case.name not in options.only):
            continue
        print(f"compiling {case.name}", flush=True)
        try:
            found = case.compile()
        except UserError as error:
            found = {"refused": str(error)}
            print(error, flush=True)
        (KEPT / f"{case.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page()) if any("versions" in (read(own) or {}) for own in CASES) else None
        jax.clear_caches()
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
