"""Makes the table of static times from the programs that experiments/bench/kernels.py compiled."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from anyexperts_jax.aot import kernels
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.ops.expert_mlp import tpu_size_table as size_table
from anyexperts_jax.ops.expert_mlp.tpu_sizes import Shape, TpuSizes
from experiments.bench import tpu_model, tpu_peers

BUDGETS = {"8.0": 1.0, "4.8": 0.6}  # real experts per token: share of the rows
PARTS = {"forward": ("forward",), "forward_kept": ("forward_kept",), "backward": ("backward", "weights")}
LIBRARIES = ("tokamax", "megablox")


def rows_of(shape: kernels.ExpertShape) -> int:
    """Returns the rows of a buffer, padded as in `expert_mlp`."""
    return -(-shape.capacity // 16) * 16


def sizes_for(chip: str, shape: kernels.ExpertShape) -> TpuSizes:
    return size_table.sizes_for(
        tpus()[chip].limits, Shape(rows_of(shape), shape.width, shape.hidden, tpu_model.ITEMSIZE)
    )


def rows(programs: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns an entry per chip, shape, part and library: modelled ns per kept row at each budget, and the ratio."""
    found = []
    for chip in tpus():
        for name in kernels.SHAPES:
            for part in PARTS:
                found += _floor(chip, name, part)
                found += _ours(programs, chip, name, part)
                if part != "forward_kept":
                    found += [row for library in LIBRARIES for row in _peer(programs, chip, name, part, library)]
            found += _xla(programs, chip, name)
    return found


def _budgets(name: str) -> Iterator[tuple[str, kernels.ExpertShape, np.ndarray]]:
    """Yields (budget, shape, rows of each expert); buffers are sized by the budget, as in `dispatch`."""
    for budget, share in BUDGETS.items():
        shape = kernels.SHAPES[name]
        shape = shape._replace(rows=round(shape.rows * share))
        yield budget, shape, tpu_model.draw_counts(shape)


def _entry(chip: str, name: str, part: str, who: str, times: dict[str, tuple[float, int]]) -> dict[str, Any]:
    figures = {f"ns_{budget}": round(1e3 * us / kept, 2) for budget, (us, kept) in times.items()}
    ratio = round(times["4.8"][0] / times["8.0"][0], 3)
    return {"chip": chip, "shape": name, "part": part, "who": who, **figures, "ratio": ratio}


def _floor(chip: str, name: str, part: str) -> list[dict[str, Any]]:
    budgets = _budgets(name)
    times = {b: (tpu_model.floor_us(chip, shape, counts, part), int(counts.sum())) for b, shape, counts in budgets}
    return [_entry(chip, name, part, "floor", times)]


def _ours(programs: dict[str, Any], chip: str, name: str, part: str) -> list[dict[str, Any]]:
    found = {call: programs.get(f"{chip}/{name}/ours/{call}", {}).get("found", {}) for call in PARTS[part]}
    if any("passes" not in one for one in found.values()):
        return _unread(chip, name, part, "ours", found)
    times = {}
    for budget, shape, counts in _budgets(name):
        sizes = sizes_for(chip, shape)
        us = [
            tpu_model.longest_us(tpu_model.our_steps(call, chip, shape, sizes, one, counts), chip)
            for call, one in found.items()
        ]
        times[budget] = sum(us), int(counts.sum())
    return [_entry(chip, name, part, "ours", times)]


def _peer(programs: dict[str, Any], chip: str, name: str, part: str, library: str) -> list[dict[str, Any]]:
    matmuls = tpu_peers.matmuls(library, part, kernels.SHAPES[name])
    found = {call: programs.get(f"{chip}/{name}/{library}/{part}/{call}", {}).get("found", {}) for call in matmuls}
    if any("passes" not in one for one in found.values()):
        return _unread(chip, name, part, library, found)
    times, halved = {}, {}
    for budget, _, counts in _budgets(name):
        try:
            steps = [tpu_peers.steps(library, chip, m, found[call], counts) for call, m in matmuls.items()]
        except UserError as error:
            return _unread(chip, name, part, library, {"": {"unread": str(error)}})
        us = [tpu_model.longest_us(one, chip) for one in steps]
        times[budget] = sum(us), int(counts.sum())
        idle = [tpus()[chip].cores // one[0].cores for one in steps]
        halved[budget] = sum(u / n for u, n in zip(us, idle, strict=True)), int(counts.sum())
    entries = [_entry(chip, name, part, library, times)]
    if halved != times:  # a second core can at most double the speed
        entries.append(_entry(chip, name, part, f"{library}, were both cores used", halved))
    return entries


def _xla(programs: dict[str, Any], chip: str, name: str) -> list[dict[str, Any]]:
    """Returns XLA's own counts, never times, for programs whose schedule is not read."""
    entries = []
    for call in ("ragged_dot", "einsum"):
        one = programs.get(f"{chip}/{name}/xla/{call}", {}).get("found", {})
        if "flops" in one:
            entries.append({"chip": chip, "shape": name, "part": "forward", "who": f"xla {call}", **one})
        else:
            entries += _unread(chip, name, "forward", f"xla {call}", {call: one})
    return entries


def _unread(chip: str, name: str, part: str, who: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the reason for a missing figure; nothing if the program was not compiled."""
    reasons = [f"{call}: {one['unread']}".removeprefix(": ") for call, one in found.items() if "unread" in one]
    return [{"chip": chip, "shape": name, "part": part, "who": who, "unread": "; ".join(reasons)}] if reasons else []


def golden(kept: dict[str, Any]) -> dict[str, Any]:
    """Returns our kernels' resources: {"kernels": {chip: {shape: {kernel: figures}}}}."""
    table: dict[str, Any] = {chip: {name: {} for name in kernels.SHAPES} for chip in tpus()}
    for key, program in kept["programs"].items():
        chip, name, who, call = key.split("/", 3)
        one = program["found"]
        if who != "ours" or "passes" not in one:
            continue
        shape = kernels.SHAPES[name]
        counts = tpu_model.draw_counts(shape)
        steps = tpu_model.our_steps(call, chip, shape, sizes_for(chip, shape), one, counts)
        table[chip][name][call] = {
            "vmem_bytes": one["vmem_bytes"],
            "spills": one["spills"],
            "occupancy": one["passes"][-1]["occupancy"],
            "ns_per_row": round(1e3 * tpu_model.longest_us(steps, chip) / int(counts.sum()), 2),
        }
    return {"command": kept["command"], "note": kept["note"], "versions": kept["versions"], "kernels": table}


_HEAD = """{note}: read from the compiler, no figure is a run time.

ns of model time a kept row: each step takes the compiler's cycles once its copies have come, at the full rate of HBM
(experiments/bench/tpu_model.py). bfloat16; rows are one multinomial draw, lognormal sigma 0.3, at most what a buffer
holds. `forward` keeps nothing for a backward pass, `forward_kept` keeps gate and up, `backward` gives gradients of x
and the weights. 8.0 and 4.8 are real experts a token: at 4.8 the rows are 60% and buffers are sized by the budget;
pass cycles are those of the program compiled at 8.0. `floor` is the longer of the matmuls at the peak rate and of every
operand and result moved once; where reading the weights sets the pace its own ratio is above 0.60.
Of tokamax and megablox the matmul kernels alone are counted, not what stands between them; of their backward passes
that leaves out the gradient of SwiGLU, which is in ours (experiments/bench/tpu_peers.py). On v5p tokamax shares columns
between cores, and where they are one tile one core does all the work."""


def _missing(entries: list[dict[str, Any]]) -> list[str]:
    """Returns lines that name the programs not yet compiled."""
    have = {(row["who"], row["part"], row["chip"], row["shape"]) for row in entries}
    places = list(itertools.product(tpus(), kernels.SHAPES))
    wanted = [("ours", part) for part in PARTS] + [(w, p) for w in LIBRARIES for p in ("forward", "backward")]
    wanted += [(f"xla {call}", "forward") for call in ("ragged_dot", "einsum")]
    lines = []
    for who, part in wanted:
        lacking = [f"{chip}/{name}" for chip, name in places if (who, part, chip, name) not in have]
        if lacking:
            lines.append(f"- {who}, {part}: {'everywhere' if len(lacking) == len(places) else ', '.join(lacking)}")
    return ["", "Not compiled yet; the same command goes on from here:", *lines] if lines else []


def markdown(kept: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    head = _HEAD.format(note=kept["note"])
    lines = ["# Expert kernels on TPUs (static, no device run)", "", f"`{kept['command']}`, {versions}.", head, ""]
    lines += ["| chip | shape | part | who | ns a row at 8.0 | at 4.8 | time at 4.8 over 8.0 |", "|" + "---|" * 7]
    said = []
    for row in kept["rows"]:
        place = [row[field] for field in ("chip", "shape", "part", "who")]
        if "ns_8.0" in row:
            lines.append(
                "| " + " | ".join([*place, *(f"{row[f'ns_{b}']:.1f}" for b in BUDGETS), f"{row['ratio']:.2f}"]) + " |"
            )
        elif "flops" in row:
            said.append((*place, row))
        else:
            lines.append("| " + " | ".join([*place, f"not read: {row['unread']}", "", ""]) + " |")
    if said:
        lines += [
            "",
            "Of XLA's own programs no schedule is read. What the compiler counts of them at 8.0 (forward):",
            "",
        ]
        lines += ["| chip | shape | program | flops over useful | GB accessed |", "|" + "---|" * 5]
        for chip, name, _, who, row in said:
            lines.append(
                f"| {chip} | {name} | {who} | {row['flops'] / row['useful_flops']:.2f} | {row['bytes'] / 1e9:.2f} |"
            )
    return "\n".join([*lines, *_missing(kept["rows"])]) + "\n"
