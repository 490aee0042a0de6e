"""Times an expert's dots on a CPU with XLA, as the `xla` form calls them, and with PyTorch. Minutes on two cores.

    python -m experiments.bench.cpu_dots

Every expert has the mean number of rows, so nothing is padded, and nothing is gathered, routed or summed. The times
show how much of the difference between our layer and transformers' is due to the dots. Needs torch (extra `parity`).
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from anyexperts_jax.bench.output import environment, markdown
from anyexperts_jax.bench.stopwatch import interleaved_rounds
from anyexperts_jax.core.shapes import HOST_SHAPES, SHAPES, LayerShape
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.ops._dots import dot, row_contraction

COMMAND = "python -m experiments.bench.cpu_dots"
RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "cpu_dots.md"
ROUNDS = 9
COLUMNS = ("shape, dtype", "rows an expert", "dots", "XLA, GFLOP/s", "PyTorch, GFLOP/s", "XLA's time over PyTorch's")
FORWARD, SAME, GRADIENT = "x w_gate", "x w_gate, one expert's weights for all", "gradient of w_gate"


def operands(shape: LayerShape, dtype: str) -> tuple[Array, Array, Array]:
    """Draws (x_ECD, w_EDF, d_gate_ECF) from a unit normal."""
    rows = shape.tokens * shape.slots // shape.experts
    E, D, F = shape.experts, shape.width, shape.hidden
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    sizes = ((E, rows, D), (E, D, F), (E, rows, F))
    x_ECD, w_EDF, d_gate_ECF = (jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True))
    return x_ECD, w_EDF, d_gate_ECF


def in_place(one_expert: Callable[..., Array], into: Array, *operands: Array) -> Callable[[], Array]:
    """Returns a call that computes `one_expert(e, *operands)` for all experts into the previous call's memory."""
    held = [into]

    def run(total: Array, *operands: Array) -> Array:
        def write(e: Array, total: Array) -> Array:
            return lax.dynamic_update_index_in_dim(total, one_expert(e, *operands).astype(total.dtype), e, 0)

        return lax.fori_loop(0, total.shape[0], write, total)

    run = jax.jit(run, donate_argnums=0)

    def call() -> Array:
        held[0] = run(held[0], *operands)
        return held[0]

    return call


def xla_calls(x_ECD: Array, w_EDF: Array, d_gate_ECF: Array) -> dict[str, Callable[[], Any]]:
    """Returns calls that do what the loop over experts does: slice weights and rows, then compute the dot."""

    def own(a: Array, e: Array) -> Array:
        return lax.dynamic_index_in_dim(a, e, keepdims=False)

    def forward(e: Array, x_ECD: Array, w_EDF: Array) -> Float[Array, "C F"]:
        return dot("CD,DF->CF", own(x_ECD, e), own(w_EDF, e))

    def same(e: Array, x_ECD: Array, w_DF: Array) -> Float[Array, "C F"]:
        return dot("CD,DF->CF", own(x_ECD, e), w_DF)

    def gradient(e: Array, x_ECD: Array, d_gate_ECF: Array) -> Float[Array, "D F"]:
        return row_contraction(own(x_ECD, e), own(d_gate_ECF, e))

    return {
        FORWARD: in_place(forward, jnp.zeros_like(d_gate_ECF), x_ECD, w_EDF),
        SAME: in_place(same, jnp.zeros_like(d_gate_ECF), x_ECD, w_EDF[0]),
        GRADIENT: in_place(gradient, jnp.zeros_like(w_EDF), x_ECD, d_gate_ECF),
    }


def torch_calls(x_ECD: Array, w_EDF: Array, d_gate_ECF: Array) -> dict[str, Callable[[], Any]]:
    """Returns calls for the same products, written into one array; weights have transformers' layout."""
    import torch

    x, w, d_gate = (torch.from_dlpack(a).clone() for a in (x_ECD, w_EDF, d_gate_ECF))
    w_EFD, gate = w.mT.contiguous(), torch.empty_like(d_gate)
    d_w_EFD = torch.empty_like(w_EFD)

    def forward() -> None:
        for e in range(len(x)):
            torch.mm(x[e], w_EFD[e].t(), out=gate[e])

    def same() -> None:
        for e in range(len(x)):
            torch.mm(x[e], w_EFD[0].t(), out=gate[e])

    def gradient() -> None:
        for e in range(len(x)):
            torch.mm(d_gate[e].t(), x[e], out=d_w_EFD[e])

    return {FORWARD: forward, SAME: same, GRADIENT: gradient}


def measure(name: str, dtype: str) -> list[tuple[str, ...]]:
    """Measures the table rows of one shape and dtype."""
    arrays = operands(SHAPES[name], dtype)
    ours, theirs = xla_calls(*arrays), torch_calls(*arrays)
    calls = {f"{who} {what}": call for who, own in (("ours", ours), ("theirs", theirs)) for what, call in own.items()}
    rounds = interleaved_rounds(calls, ROUNDS, patience=30)
    num_rows = arrays[0].shape[1]
    flops = 2 * arrays[0].size * SHAPES[name].hidden
    rows = []
    for what in ours:
        speeds = (f"{flops / 1e6 / rounds.milliseconds(f'{who} {what}'):.0f}" for who in ("ours", "theirs"))
        ratio = f"{rounds.ratio(f'ours {what}', f'theirs {what}'):.2f}"
        rows.append((f"{name}, {dtype}", str(num_rows), what, *speeds, ratio))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    where = environment(ROUNDS)
    where["versions"] |= {"torch": torch.__version__}
    shapes = [name for name in HOST_SHAPES if name != "S4"]  # S4 is for decoding: one row per expert
    rows = [row for name in shapes for dtype in ("bfloat16", "float32") for row in measure(name, dtype)]
    RESULT.write_text(markdown("An expert's dots on a CPU", COMMAND, where, [TextTable("Dots", COLUMNS, tuple(rows))]))


if __name__ == "__main__":
    main()
