"""Writes experiments/results/permute_combine.md: static times of gathering tokens and summing rows on TPUs.

    JAX_PLATFORMS=cpu python experiments/bench/permute_combine.py [FOLDER]

Needs no TPU, but the extra `aot`. Takes about a minute. A program's time is the longer of its cycles, read from the
compiler's schedule with every loop counted as often as it runs, and of its copies at the chip's published bandwidth.
"""

import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp

from anyexperts_jax.aot import report, topology
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.core.shapes import SHAPES
from anyexperts_jax.ops.routed_mlp import pallas_combine
from anyexperts_jax.ops.row_map import RowMap, sum_rows

COMMAND = "JAX_PLATFORMS=cpu python experiments/bench/permute_combine.py"
LAYER = SHAPES["P"]
TOKENS, SLOTS, WIDTH, ROWS = LAYER.tokens, LAYER.slots, LAYER.width, LAYER.rows
CHIPS = ("v5e", "v6e")
ROW_BYTES = 2 * WIDTH  # bfloat16
SUM_BYTES = 4 * WIDTH * TOKENS  # float32
PAIRS = 2  # a row of bfloat16 is read from HBM with its neighbour

EXIT_TEST = re.compile(r"totalorder [^,]+, (\d+) /\* loop exit test")
BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) ")


def xla_gather(x_ND, tokens_R):
    return x_ND[tokens_R]


def xla_gather_and_clear(x_ND, tokens_R, live_R):
    return jnp.where(live_R[:, None], x_ND[tokens_R], 0)


def xla_combine(y_RD, weights_NK, rows_NK, held_NK):
    nothing = jnp.zeros(0, jnp.int32)
    return sum_rows(y_RD, weights_NK, RowMap(nothing, nothing, nothing, rows_NK, held_NK))


def cases():
    """Returns {name: (function, arguments, {part of a program's name: (how often it runs, bytes it copies)})}."""
    x, y = array(TOKENS, WIDTH), array(ROWS, WIDTH)
    ints, held = array(TOKENS, SLOTS, dtype=jnp.int32), array(TOKENS, SLOTS, dtype=bool)
    weights = array(TOKENS, SLOTS, dtype=jnp.float32)
    read, written = TOKENS * ROW_BYTES, ROWS * ROW_BYTES
    gather = {"gather": (1, read + written)}
    clear = gather | {"select": (1, 2 * written)}
    combine = {"gather": (SLOTS, (PAIRS + 1) * TOKENS * ROW_BYTES), "select_add": (1, written + SUM_BYTES)}
    kernel = {"combine_rows": (1, PAIRS * written + SUM_BYTES)}
    rows = (array(ROWS, dtype=jnp.int32), array(ROWS, dtype=bool))
    return {
        "permute, XLA": (xla_gather, (x, rows[0]), gather),
        "permute with dead rows cleared, XLA": (xla_gather_and_clear, (x, *rows), clear),
        "combine, XLA": (xla_combine, (y, weights, ints, held), combine),
        "combine, kernel": (pallas_combine.combine, (y, weights, ints), kernel),
    }


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def program_cycles(directory, part):
    """Returns the cycles of the program of that name; None if XLA gave it to a SparseCore, without a schedule."""
    found = [
        p for p in directory.glob(f"*{report._UTILISATION}") if re.search(rf"-\w*{part}\w*(\.\d+)?-\d+-pre", p.name)
    ]
    if not found:
        return None
    path = found[0]
    stem = re.sub(r"-\d+$", "", path.name.removesuffix(report._UTILISATION))
    schedule = report._one(directory, stem, report._SCHEDULE).read_text(errors="replace")
    bundles = len(report._read_utilisation(path)[1])
    return counted(report._spans(schedule, bundles), exit_tests(schedule))


def exit_tests(schedule):
    """Returns [(bundle, bound)] of every loop's exit test."""
    place, found = 0, []
    for line in schedule.splitlines():
        number = BUNDLE.match(line)
        place = int(number.group(1), 16) if number else place
        found += [(place, int(test.group(1))) for test in EXIT_TEST.finditer(line)]
    return found


def counted(span, tests):
    """Returns the cycles of a span, with each loop counted as often as it runs.

    Code that some steps skip counts at every step, except the first of two adjacent loops: the copies that the kernel
    starts for its first step only.
    """
    children = [child for child in span.children if child.end > child.start]
    loops = [child for child in children if bound(child, tests) > 1]
    inner = sum(counted(child, tests) for child in children if len(loops) < 2 or child is not loops[0])
    own = span.end - span.start - sum(child.end - child.start for child in children)
    return (own + inner) * bound(span, tests)


def bound(span, tests):
    """Returns how often a span runs in a row, read from its loop's exit test."""
    inner = [(child.start, child.end) for child in span.children]
    own = [n for place, n in tests if span.start <= place < span.end and not any(a <= place < b for a, b in inner)]
    return own[-1] if own and span.kind != "program" else 1


def rows_of(chip, directory):
    clock, bandwidth = tpus()[chip].clock_ghz, tpus()[chip].hbm_gbs
    for name, (function, arguments, programs) in cases().items():
        for path in directory.glob("*"):
            path.unlink()
        memory = topology.compile_for(chip, function, arguments).memory_analysis()
        total, cells = 0.0, []
        for part, (times, copied) in programs.items():
            cycles = program_cycles(directory, part)
            issue, copies = (cycles or 0) / clock / 1e6, copied / bandwidth / 1e6
            total += times * max(issue, copies)
            spent = "on a SparseCore, no schedule" if cycles is None else f"{issue:.2f} ms of cycles"
            cells.append(f"{times} x {part}: {spent}, {copies:.2f} ms of copies")
        yield f"| {chip} | {name} | {total:.2f} | {'; '.join(cells)} | {memory.temp_size_in_bytes / 2**20:.0f} |"


def main(folder):
    with tempfile.TemporaryDirectory() as directory:
        topology.open_compiler(pathlib.Path(directory))
        table = [row for chip in CHIPS for row in rows_of(chip, pathlib.Path(directory))]
    lines = [
        "# Permute and combine on TPU (static)",
        "",
        f"`{COMMAND}`, JAX {jax.__version__}.",
        "Read from libtpu's schedules; nothing was run, no figure is a measured time.",
        f"{TOKENS} tokens of {SLOTS} slots, D {WIDTH}, bfloat16: {ROWS} rows, every slot real. ms is the sum over the",
        "programs of the longer of cycles and copies; of what a SparseCore does only the copies are known.",
        "",
        "| chip | what | ms | programs | temporary MiB |",
        "|---|---|---|---|---|",
        *table,
        "",
        "XLA's gather from x, which it keeps in VMEM on v5e, is bound by the writing of its result: as long as x",
        "fits there a kernel for it does not pay. Clearing the rows that hold no slot would cost more than the",
        "gather, so they are left as they are. XLA's sum writes every slot's rows out and reads them back; the",
        "kernel adds them up where they arrive, and slots without a real expert, which XLA gathers like the others,",
        "start no copy in it. Half of its copies are the rows' neighbours in bfloat16.",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "permute_combine.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "experiments/results"))
