"""`anyexperts bench layer`, `step`, `data` and `serve`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import (
    adapters_of,
    add_adapters,
    add_command,
    add_config,
    add_data,
    add_model,
    data_overrides,
    positive,
    positive_number,
    say,
    seed,
)
from anyexperts_jax.core.shapes import HOST_SHAPES, SHAPES


def run_layer(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.bench.layer import Timing, bench_layer, layer_tables, write_bench
    from anyexperts_jax.core.text_table import print_tables

    timing = Timing(options.rounds, repeats=options.repeats)
    bench = bench_layer(options.shape, options.dtype, timing, options.implementation or [None], note=say)
    print_tables(layer_tables(bench), Console(highlight=False))
    if options.out:
        names = (*options.shape, "--dtype", *options.dtype, "--rounds", str(options.rounds))
        names += ("--repeats", str(options.repeats)) if options.repeats > 1 else ()
        names += ("--implementation", *options.implementation) if options.implementation else ()
        command = f"anyexperts bench layer --shape {' '.join(names)} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def run_step(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.bench.step import bench_step, step_table, write_bench
    from anyexperts_jax.core.text_table import print_tables

    bench = bench_step(options.size, rounds=options.rounds, note=say)
    print_tables([step_table(bench)], Console(highlight=False))
    if options.out:
        command = f"anyexperts bench step --size {options.size} --rounds {options.rounds} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def run_data(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.bench.data import bench_data, data_tables, write_bench
    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.train.config import load_config

    own = data_overrides(options.config, options.data, options.plugin)
    config = load_config(options.config, [*own, *options.set], options.plugin).data
    bench = bench_data(config, options.examples, options.rounds, note=say)
    print_tables(data_tables(bench), Console(highlight=False))
    if options.out:
        given = [*(f"--data {one}" for one in options.data), *(f"--set {one!r}" for one in options.set)]
        names = " ".join([options.config, *given])
        command = f"anyexperts bench data {names} --examples {options.examples} --rounds {options.rounds}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def run_serve(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.serve.run import require_serve

    require_serve()
    from anyexperts_jax.bench.serve import Load, bench_serve, serve_tables, write_bench
    from anyexperts_jax.serve.model import load_served

    load = Load(
        tuple(options.clients),
        options.requests,
        options.prompt_tokens,
        options.answer_tokens,
        slots=options.slots,
        length=options.length,
        budgets=tuple(options.budget or ()),
        seed=options.seed,
        rounds=options.rounds,
    )
    model = load_served(options.path, max_budget=max(load.budgets, default=None), adapters=adapters_of(options))
    bench = bench_serve(model, load, note=say)
    print_tables(serve_tables(bench), Console(highlight=False))
    if options.out:
        clients = " ".join(map(str, load.clients))
        sizes = f"--requests {load.requests} --prompt-tokens {load.prompt} --answer-tokens {load.answer}"
        sizes += f" --slots {load.slots} --length {load.length} --seed {load.seed} --rounds {load.rounds}"
        sizes += "".join(f" --adapter {one}" for one in options.adapter)
        sizes += "".join([" --budget", *(f" {budget:g}" for budget in load.budgets)]) if load.budgets else ""
        command = f"anyexperts bench serve {options.path} --clients {clients} {sizes} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def add(commands: argparse._SubParsersAction) -> None:
    layer_example = "anyexperts bench layer --shape S1 --dtype float32"
    step_example = "anyexperts bench step --rounds 3 --out runs/bench"
    bench = add_command(
        commands,
        "bench",
        "time the layer, the train step, the data pipeline and the server, compared with other installed libraries",
        (layer_example, step_example),
    )
    actions = bench.add_subparsers(title="actions", required=True, metavar="ACTION")
    layer = add_command(
        actions,
        "layer",
        "time the MoE layer alone, its parts, and its time against the budget",
        (layer_example, "anyexperts bench layer --dtype bfloat16 --shape P --repeats 10 --out runs/bench"),
    )
    larger, here = " ".join(name for name in SHAPES if name not in HOST_SHAPES), " ".join(HOST_SHAPES)
    shapes = f"{here}, for accelerators {larger} (default: {here})"
    layer.add_argument("--shape", nargs="+", default=list(HOST_SHAPES), help=shapes)
    dtypes = ["float32", "bfloat16"]
    layer.add_argument("--dtype", nargs="+", default=dtypes, help="float32, bfloat16 (default: both)")
    layer.add_argument("--rounds", type=positive, default=7, help="interleaved rounds; medians are shown")
    layer.add_argument("--repeats", type=positive, default=1, help="calls in a row per sample, for example 10 on a GPU")
    layer.add_argument(
        "--implementation",
        nargs="+",
        metavar="NAME",
        help="implementations of the expert ops, for example pallas_gpu xla (default: the platform's)",
    )
    _add_out(layer, "layer")
    layer.set_defaults(command=run_layer)
    step = add_command(actions, "step", "time one train step of a text model", (step_example,))
    step.add_argument("--size", default="40M", help="40M in float32, or for GPUs 800M in bfloat16")
    step.add_argument("--rounds", type=positive, default=7, help="interleaved rounds; medians are shown")
    _add_out(step, "step")
    step.set_defaults(command=run_step)
    data_example = "anyexperts bench data tiny --data mine=chats.jsonl --examples 100"
    data = add_command(
        actions, "data", "time reading and encoding a run's data, compared with the plain library", (data_example,)
    )
    add_config(data)
    add_data(data, "data of yours: a file, pattern, folder or address; repeatable")
    data.add_argument("--examples", type=positive, default=200, help="number of train examples of each domain")
    data.add_argument("--rounds", type=positive, default=5, help="interleaved rounds; medians are shown")
    _add_out(data, "data")
    data.set_defaults(command=run_data)
    _add_serve(actions)


def _add_serve(actions: argparse._SubParsersAction) -> None:
    serve = add_command(
        actions,
        "serve",
        "put the server under load, and compare every answer with that of a single request",
        (
            "anyexperts bench serve models/mine --clients 1 4 16 --budget 2 4",
            "anyexperts bench serve models/mine --rounds 5 --adapter law=adapters/law --adapter code=adapters/code",
        ),
    )
    add_model(serve)
    serve.add_argument(
        "--clients",
        type=positive,
        nargs="+",
        default=[1, 4, 16],
        metavar="N",
        help="numbers of concurrent clients to try",
    )
    serve.add_argument("--requests", type=positive, default=32, metavar="N", help="requests for each number of clients")
    serve.add_argument("--prompt-tokens", type=positive, default=48, metavar="N", help="median prompt length")
    serve.add_argument("--answer-tokens", type=positive, default=24, metavar="N", help="median answer length")
    serve.add_argument(
        "--budget",
        type=positive_number,
        nargs="+",
        metavar="K",
        help="real experts per token; requests take these budgets in turn (default: the model's own)",
    )
    serve.add_argument("--slots", type=positive, default=8, metavar="N", help="requests that the server runs at once")
    serve.add_argument("--length", type=positive, default=256, metavar="T", help="tokens of a prompt and its answer")
    serve.add_argument("--seed", type=seed, default=0, help="seed of the prompts and lengths")
    serve.add_argument(
        "--rounds", type=positive, default=1, metavar="N", help="interleaved rounds of all loads; medians are shown"
    )
    add_adapters(
        serve,
        "a low-rank adapter; each load is also measured with requests that take the adapters in turn; repeatable "
        "(default: none)",
    )
    _add_out(serve, "serve")
    serve.set_defaults(command=run_serve)


def _add_out(parser: argparse.ArgumentParser, name: str) -> None:
    text = f"also write bench_{name}.json, .csv and .md into this folder (default: print only)"
    parser.add_argument("--out", type=pathlib.Path, help=text)
