"""`anyexperts bench layer` and `anyexperts bench step`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import say
from anyexperts_jax.core.shapes import HOST_SHAPES, SHAPES


def run_layer(options: argparse.Namespace) -> None:
    from anyexperts_jax.bench.layer import Timing, bench_layer, layer_tables, write_bench
    from anyexperts_jax.bench.output import print_tables

    timing = Timing(options.rounds, repeats=options.repeats)
    bench = bench_layer(options.shape, options.dtype, timing, options.implementation or [None], note=say)
    print_tables(layer_tables(bench))
    if options.out:
        names = (*options.shape, "--dtype", *options.dtype, "--rounds", str(options.rounds))
        names += ("--repeats", str(options.repeats)) if options.repeats > 1 else ()
        names += ("--implementation", *options.implementation) if options.implementation else ()
        command = f"anyexperts bench layer --shape {' '.join(names)} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def run_step(options: argparse.Namespace) -> None:
    from anyexperts_jax.bench.output import print_tables
    from anyexperts_jax.bench.step import bench_step, step_table, write_bench

    bench = bench_step(options.size, rounds=options.rounds, note=say)
    print_tables([step_table(bench)])
    if options.out:
        command = f"anyexperts bench step --size {options.size} --rounds {options.rounds} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def add(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench", help="time the layer and the train step, beside transformers where it is there"
    )
    actions = bench.add_subparsers(title="actions", required=True, metavar="ACTION")
    layer = actions.add_parser("layer", help="the MoE layer alone, its parts, and its time against the budget")
    larger = " ".join(name for name in SHAPES if name not in HOST_SHAPES)
    shapes = f"{' '.join(HOST_SHAPES)} (default), for accelerators {larger}"
    layer.add_argument("--shape", nargs="+", default=list(HOST_SHAPES), help=shapes)
    layer.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="float32, bfloat16 (default: both)")
    layer.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are shown (default: 7)")
    layer.add_argument("--repeats", type=int, default=1, help="calls on end a sample, as 10 on a GPU (default: 1)")
    layer.add_argument(
        "--implementation",
        nargs="+",
        help="of the expert ops, as pallas_gpu xla (default: the platform's)",
    )
    layer.add_argument("--out", type=pathlib.Path, help="also write bench_layer.json, .csv and .md into this folder")
    layer.set_defaults(command=run_layer)
    step = actions.add_parser("step", help="one train step of a text model")
    step.add_argument("--size", default="40M", help="40M in float32, or for GPUs 800M in bfloat16 (default: 40M)")
    step.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are shown (default: 7)")
    step.add_argument("--out", type=pathlib.Path, help="also write bench_step.json, .csv and .md into this folder")
    step.set_defaults(command=run_step)
