"""The command line: `anyexperts train | evolve | evaluate | report | generate | data | bench | compile | reproduce`.

Thin: each command reads its arguments and calls one function. Exit codes: 0 done, 2 a wrong input or a file that cannot
be used, 3 a loss that is not finite, 4 a full disk, 5 another process of the run gone, 130 and 143 interrupted with a
checkpoint written.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from anyexperts_jax import __version__
from anyexperts_jax.core.errors import UserError, require

SECONDS_FOR_THE_SAME_ERROR = 2.0  # that other processes have to say it as well
OUTPUTS = ("folder", "out", "json", "run", "runs")  # options that say where a command writes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    options = _parser().parse_args(arguments)
    from anyexperts_jax.train.stops import RunStoppedError, file_failure

    try:
        if "processes" in options and options.command is not _train:
            from anyexperts_jax.train.processes import require_alone

            require_alone(options.processes)
        options.command(options)
    except UserError as error:
        code = _fail(str(error), 2)
        _leave_the_others(code, SECONDS_FOR_THE_SAME_ERROR)
        return code
    except RunStoppedError as error:
        code = _fail(str(error), error.exit_code)
        if error.alone:
            _leave_the_others(code)
        return code
    except (OSError, RuntimeError) as error:
        failure = file_failure(error, next(filter(None, (getattr(options, name, None) for name in OUTPUTS)), None))
        if failure is None:
            raise
        code = _fail(*failure)
        _leave_the_others(code, SECONDS_FOR_THE_SAME_ERROR)
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"anyexperts: {message}", file=sys.stderr)
    return code


def _leave_the_others(code: int, after: float = 0.0) -> None:
    """Ends one process of several, `after` seconds: at a regular exit JAX waits for the others, who may not know."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        time.sleep(after)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train(options: argparse.Namespace) -> None:
    from anyexperts_jax.train import processes
    from anyexperts_jax.train.config import load_config
    from anyexperts_jax.train.loop import train

    config = load_config(options.config, options.set)
    run_dir = options.run or pathlib.Path("runs") / pathlib.Path(options.config).stem
    peers = processes.find_peers(options.processes, options.process_index, options.coordinator)
    if peers is not None:
        processes.connect(peers, config.runtime.peer_timeout)
    result = train(config, run_dir)
    if processes.is_first():
        print(f"run: {result.run_dir}")


def _evolve(options: argparse.Namespace) -> None:
    from anyexperts_jax.evolution.config import STAGES, load_evolve_config
    from anyexperts_jax.evolution.stages import evolve

    run = load_evolve_config(options.config, options.set)
    root = options.run or pathlib.Path("runs") / pathlib.Path(options.config).stem
    for name, result in evolve(run, root, tuple(options.stage or STAGES), note=_say).items():
        print(f"{name}: {result.run_dir}, step {result.step}, validation loss {result.validation['loss']:.3f}")
        for expert, found in result.validation.get("experts", {}).items():
            print(f"  {expert} alone: loss {found['loss']:.3f}, {found['distance']:.1e} of expert_1's norm from it")


def _evaluate(options: argparse.Namespace) -> None:
    from anyexperts_jax.analysis.evaluate import Options, evaluate
    from anyexperts_jax.analysis.tables import print_evaluation

    amounts = Options(num_examples=options.examples, calibration_examples=options.calibration_examples)
    asked = (options.run, options.budget, options.domain)
    evaluate(*asked, which=options.checkpoint, options=amounts, note=_say, show=print_evaluation)


def _report(options: argparse.Namespace) -> None:
    from anyexperts_jax.analysis.routing_report import report

    print(f"report: {report(options.run)}")


def _generate(options: argparse.Namespace) -> None:
    from anyexperts_jax.analysis.ask import ask, own_example
    from anyexperts_jax.analysis.trained import load_trained
    from anyexperts_jax.data.mixture import open_source

    trained = load_trained(options.run, options.checkpoint)
    data = trained.config.data
    if options.question is not None:
        example = own_example(options.question, data.encoding, image=options.image, audio=options.audio)
    else:
        require(not (options.image or options.audio), "--image and --audio go with --question")
        require(options.index >= 0, f"--index={options.index} must be >= 0")
        source = open_source(data, options.domain or data.domains[0], options.split, options.index + 1)
        example = source[options.index]
    reply = ask(trained, example, options.budget)
    print(f"question: {example.question}")
    if options.question is None:
        print(f"expected: {example.answer}")
    print(f"answer:   {reply.answer}")
    real = ", ".join(f"{name} {mean:.2f}" for name, mean in reply.real_slots.items())
    print(f"real experts per token: {real} (window {reply.window[0]:g} to {reply.window[1]:g})")


def _data_show(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.domain import DOMAIN_NAMES
    from anyexperts_jax.data.show import show

    for name in options.domain or DOMAIN_NAMES:
        show(
            name,
            options.split,
            options.count,
            options.out,
            start=options.start,
            seed=options.seed,
            levels=options.level or (1, 2, 3),
        )


def _data_export(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.array_records import export_array_record
    from anyexperts_jax.data.source import GeneratedSource

    source = GeneratedSource(options.domain, options.split, options.count, options.seed, (1, 2, 3))
    folder = export_array_record(source, options.folder, options.split, shards=options.shards)
    print(f"{options.count} examples of {options.domain}/{options.split} in {folder}")


def _bench_layer(options: argparse.Namespace) -> None:
    from anyexperts_jax.analysis.bench_layer import Timing, bench_layer, layer_tables, write_bench
    from anyexperts_jax.analysis.bench_output import print_tables

    timing = Timing(options.rounds, repeats=options.repeats)
    bench = bench_layer(options.shape, options.dtype, timing, options.implementation or [None], note=_say)
    print_tables(layer_tables(bench))
    if options.out:
        names = (*options.shape, "--dtype", *options.dtype, "--rounds", str(options.rounds))
        names += ("--repeats", str(options.repeats)) if options.repeats > 1 else ()
        names += ("--implementation", *options.implementation) if options.implementation else ()
        command = f"anyexperts bench layer --shape {' '.join(names)} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def _bench_step(options: argparse.Namespace) -> None:
    from anyexperts_jax.analysis.bench_output import print_tables
    from anyexperts_jax.analysis.bench_step import bench_step, step_table, write_bench

    bench = bench_step(options.size, rounds=options.rounds, note=_say)
    print_tables([step_table(bench)])
    if options.out:
        command = f"anyexperts bench step --size {options.size} --rounds {options.rounds} --out {options.out}"
        print(f"wrote {', '.join(map(str, write_bench(bench, options.out, command)))}")


def _compile(options: argparse.Namespace) -> None:
    import json

    from anyexperts_jax.analysis.bench_output import print_tables
    from anyexperts_jax.aot import search, step, step_tables
    from anyexperts_jax.aot.fit import require_fits
    from anyexperts_jax.train.config import load_config

    config = load_config(options.config, options.set)
    if options.search:
        _say(f"compiling train steps of {options.config} for {options.topology}; nothing is run")
        tried = search.search(config, options.topology, options.slices, options.limit, note=_say)
        print_tables([search.search_table(tried, options.topology)])
        figures: object = search.search_json(tried)
    else:
        _say(f"compiling the train step of {options.config} for {options.topology}; nothing is run")
        compiled = step.compile_step(config, options.topology, options.slices)
        print_tables(step_tables.step_tables(compiled))
        figures = step_tables.to_json(compiled)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {options.json}")
    if not options.search:
        require_fits(config, options.topology, compiled.mesh, compiled.memory, compiled.hbm)


def _reproduce(options: argparse.Namespace) -> None:
    from anyexperts_jax.reproduce.command import Request, reproduce

    fields = (field.name for field in dataclasses.fields(Request))
    reproduce(Request(**{name: getattr(options, name) for name in fields}), note=_say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anyexperts", description="Mixture-of-experts models in which each token gets as many experts as it needs."
    )
    parser.add_argument("--version", action="version", version=f"anyexperts-jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evolve(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_generate(commands)
    _add_data(commands)
    _add_bench(commands)
    _add_compile(commands)
    _add_reproduce(commands)
    for name in ("evolve", "evaluate", "report", "generate"):
        commands.choices[name].add_argument("--processes", metavar="1", help="1: alone, whatever the environment says")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (tiny, small, smoke), a TOML file, or a run's config.json")
    _add_set(parser, "override, as in optim.lr=1e-3; repeatable")


def _add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train a model, or go on with a run that stopped")
    _add_config(parser)
    parser.add_argument("--run", type=pathlib.Path, help="the run's directory (default: runs/CONFIG)")
    many = parser.add_argument_group(
        "several processes", "each runs this command; a Slurm step and GKE's TPU pods are found without these options"
    )
    many.add_argument("--processes", metavar="N|auto", help="how many; auto: ask the cluster (Cloud TPU VMs); 1: alone")
    many.add_argument("--process-index", type=int, metavar="I", help="which one this is, from 0")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.set_defaults(command=_train)


def _add_evolve(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evolve", help="EvoMoE: a dense model, experts evolved from it, a router for them")
    parser.add_argument("config", help="a preset (evolve_tiny, evolve_smoke), a TOML file, or a run's evolve.json")
    _add_set(parser, "override, as in evolve.trains=all; repeatable")
    parser.add_argument("--run", type=pathlib.Path, help="the run's directory (default: runs/CONFIG)")
    parser.add_argument("--stage", nargs="+", help="of warm_up evolving routing (default: all, in order)")
    parser.set_defaults(command=_evolve)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="score one checkpoint at several budgets")
    _add_run(parser)
    parser.add_argument(
        "--budget", type=float, nargs="+", metavar="K", help="real experts per token (default: four near the run's)"
    )
    parser.add_argument("--domain", nargs="+", help="domains to evaluate (default: all of the run)")
    parser.add_argument("--examples", type=int, default=64, help="test examples of each domain (default: 64)")
    parser.add_argument(
        "--calibration-examples", type=int, default=32, help="validation examples of each domain that set the window"
    )
    parser.set_defaults(command=_evaluate)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="write one HTML page and pictures about a run")
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.set_defaults(command=_report)


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="answer one question with a trained model")
    _add_run(parser)
    parser.add_argument("--domain", help="take the question from this domain (default: the run's first)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--index", type=int, default=0, help="number of the example in the split, from 0")
    parser.add_argument("--question", help="ask this instead")
    parser.add_argument("--image", type=pathlib.Path, help="a picture that --question is about")
    parser.add_argument("--audio", type=pathlib.Path, help="a WAV file that --question is about")
    parser.add_argument("--budget", type=float, metavar="K", help="real experts per token (default: as trained)")
    parser.set_defaults(command=_generate)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="look at the five domains, or write them to disk")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print and draw examples (PNG, WAV)")
    show.add_argument("domain", nargs="*", help="domains (default: all five)")
    show.add_argument("--split", default="train", choices=("train", "validation", "test"))
    show.add_argument("--count", type=int, default=12)
    show.add_argument("--start", type=int, default=0)
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--level", type=int, nargs="+", choices=(1, 2, 3))
    show.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/data"))
    show.set_defaults(command=_data_show)
    export = actions.add_parser("export", help="write a generated domain as ArrayRecord files")
    export.add_argument("domain")
    export.add_argument("folder", type=pathlib.Path)
    export.add_argument("--split", default="train", choices=("train", "validation", "test"))
    export.add_argument("--count", type=int, default=1000)
    export.add_argument("--seed", type=int, default=0)
    export.add_argument("--shards", type=int, default=1)
    export.set_defaults(command=_data_export)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench", help="time the layer and the train step, beside transformers where it is there"
    )
    actions = bench.add_subparsers(title="actions", required=True, metavar="ACTION")
    layer = actions.add_parser("layer", help="the MoE layer alone, its parts, and its time against the budget")
    shapes = ["S1", "S2", "S3", "S4"]
    layer.add_argument("--shape", nargs="+", default=shapes, help="S1 S2 S3 S4 (default), for accelerators A B P P4")
    layer.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="float32, bfloat16 (default: both)")
    layer.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are shown (default: 7)")
    layer.add_argument("--repeats", type=int, default=1, help="calls on end a sample, as 10 on a GPU (default: 1)")
    layer.add_argument(
        "--implementation",
        nargs="+",
        help="of the expert ops, as pallas_gpu xla (default: the platform's)",
    )
    layer.add_argument("--out", type=pathlib.Path, help="also write bench_layer.json, .csv and .md into this folder")
    layer.set_defaults(command=_bench_layer)
    step = actions.add_parser("step", help="one train step of a text model")
    step.add_argument("--size", default="40M", help="40M in float32, or for GPUs 800M in bfloat16 (default: 40M)")
    step.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are shown (default: 7)")
    step.add_argument("--out", type=pathlib.Path, help="also write bench_step.json, .csv and .md into this folder")
    step.set_defaults(command=_bench_step)


def _add_compile(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compile", help="compile the train step for TPUs or GPUs that are not here")
    _add_config(parser)
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="as v5e:4x4, v5p:8x8x8 or h100:2x8")
    parser.add_argument("--slices", type=int, default=1, help="so many of them (default: 1); see mesh.dcn_data")
    parser.add_argument("--search", action="store_true", help="try meshes and remat policies, and rank those that fit")
    parser.add_argument("--limit", type=int, default=4, help="how many --search compiles (default: 4)")
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures into this file")
    parser.set_defaults(command=_compile)


def _add_reproduce(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("reproduce", help="the paper's tables and figures, over seeds, with verdicts")
    parser.add_argument(
        "tables",
        nargs="+",
        metavar="table",
        help="table1 table2 table3 figure3 figure4 figure5 or all; evomoe-components -routers -diversity -beta "
        "-experts -slots or evomoe; or TOML files",
    )
    parser.add_argument("--scale", default="tiny", help="tiny: two cores, the default; small: one accelerator")
    parser.add_argument("--runs", type=pathlib.Path, help="where runs are kept (default: runs/reproduce)")
    parser.add_argument("--workers", type=int, help="runs side by side (default: cores; at --scale small 1)")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="stop then; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="few steps and one seed: does it work, not what it says")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="make the runs of these alone: a share for each of several hosts"
    )
    _add_set(parser, "override in every run; repeatable")
    parser.add_argument("--only", choices=("runs", "tables"), help="make the runs alone, or tables of what is done")
    parser.add_argument("--out", type=pathlib.Path, help="of tables (default: in experiments/results/reproduce)")
    parser.add_argument("--readme", type=pathlib.Path, help="also write the block between its markers")
    parser.set_defaults(command=_reproduce)
