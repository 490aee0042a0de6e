"""Measures the cost on a mesh of ranking tokens by salience within the batch, a device's tokens, or a sequence.

    JAX_PLATFORMS=cpu python -m experiments.bench.salience_scope    with libtpu; minutes on two cores

Compiles the backward pass of one layer's `rank_by_salience` for TPUs, none attached, and reads the collectives and
temporaries; nothing is run on them. The time of sorting is measured on this CPU.
"""

import importlib.metadata
import pathlib
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from anyexperts_jax.aot.collectives import read_collectives
from anyexperts_jax.aot.topology import slice_devices
from anyexperts_jax.bench.stopwatch import interleaved_rounds
from anyexperts_jax.core.switches import SalienceScope
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import versions
from anyexperts_jax.routing.salience import midranks, rank_by_salience, token_groups
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import DEFAULT_RULES, batch_shards

COMMAND = "JAX_PLATFORMS=cpu python -m experiments.bench.salience_scope"
RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "salience_scope.md"
LENGTH, SLOTS = 4096, 12  # positions of each device's one sequence, and slots per token
TOPOLOGIES = ("v5e:2x4", "v5e:16x16")
HOST_TOKENS = (LENGTH, 8 * LENGTH, 64 * LENGTH, 256 * LENGTH)
ROUNDS = 5


def backward(scope: SalienceScope, shards: int):  # type: ignore[no-untyped-def]
    """Returns the gradient to importance [B, T] as a function of [B, T] and [B, T, K] arrays."""

    def loss(importance_BT: jax.Array, weights_BTK: jax.Array, slopes_BTK: jax.Array, valid_BT: jax.Array) -> jax.Array:
        groups = token_groups(scope, len(importance_BT), shards)
        weights_NK, own = rank_by_salience(
            weights_BTK.reshape(-1, SLOTS), importance_BT.reshape(-1), valid_BT.reshape(-1), groups
        )
        return (weights_NK.reshape(slopes_BTK.shape) * slopes_BTK).sum() + own

    return jax.grad(loss)


def compiled_row(topology: str, scope: SalienceScope) -> tuple[str, ...]:
    mesh = make_mesh(MeshConfig(), slice_devices(topology))

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        spec = DEFAULT_RULES.spec(("batch", *("norm",) * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    sizes = (mesh.size, LENGTH)
    slots = array("float32", *sizes, SLOTS)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(backward(scope, batch_shards(mesh))).lower(
            array("float32", *sizes), slots, slots, array("bool", *sizes)
        )
    program = lowered.compile()
    sent = read_collectives(program.as_text(), dict(mesh.shape))
    told = "; ".join(f"{row.count} {row.kind} of {row.bytes:,} bytes" for row in sent)
    mib = program.memory_analysis().temp_size_in_bytes / 2**20
    group = sizes[0] * sizes[1] // token_groups(scope, sizes[0], batch_shards(mesh))
    return topology, scope, f"{group:,}", told, f"{mib:.2f}"


def host_table() -> TextTable:
    rng = np.random.default_rng(0)

    def call(tokens: int):  # type: ignore[no-untyped-def]
        values, valid = jnp.asarray(rng.random(tokens), jnp.float32), jnp.ones(tokens, bool)
        program = jax.jit(midranks).lower(values, valid).compile()
        return lambda: program(values, valid)

    found = interleaved_rounds({str(tokens): call(tokens) for tokens in HOST_TOKENS}, ROUNDS)
    rows = [(f"{tokens:,}", f"{found.milliseconds(str(tokens)):.2f}") for tokens in HOST_TOKENS]
    load = "-" if found.others_load is None else f"{found.others_load:.1f}"
    title = f"Ranking on a CPU, one layer, medians of {ROUNDS} rounds; other processes kept {load} cores busy"
    return TextTable(title, ("tokens ranked together", "ms"), tuple(rows))


NOTES = """\
`{command}`, with {versions}. One MoE layer's backward pass, {length} tokens a device in one sequence, {slots} slots.
The first table is static, read from libtpu's programs; nothing was run on a TPU.

- In the scope `batch` every device gathers four bytes of every token of the batch, and all of them sort all of it: what
  a device sorts, and waits for, grows with the number of devices. It is the default, as it ranks what the method
  compares, all tokens of the batch, and gives one result on every mesh; on one device it costs what the others do.
- On a mesh of many devices take `device`: the ranks of a sample of the batch, for an all-reduce of one number.
  `sequence` costs as little and is the same on every mesh and in every micro-batch, but moves slots within a sequence
  alone.
- Where the mesh's axis `sequence` splits sequences, its devices exchange saliences in every scope.
"""


def main() -> None:
    rows = [compiled_row(topology, scope) for topology in TOPOLOGIES for scope in get_args(SalienceScope)]
    columns = ("slice", "scope", "tokens ranked together", "collectives", "temporaries, MiB")
    tables = [TextTable("Compiled for TPUs, one layer", columns, tuple(rows)), host_table()]
    found = versions() | {"libtpu": importlib.metadata.version("libtpu")}
    packages = ", ".join(f"{name} {found[name]}" for name in ("python", "jax", "jaxlib", "libtpu"))
    notes = NOTES.format(command=COMMAND, versions=packages, length=LENGTH, slots=SLOTS)
    text = ["# What ranking by salience costs on a mesh", "", notes]
    for table in tables:
        head, *body = ("| " + " | ".join(row) + " |" for row in (table.columns, *table.rows))
        text += [f"## {table.title}", "", head, "|---" * len(table.columns) + "|", *body, ""]
    RESULT.write_text("\n".join(text).rstrip() + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
