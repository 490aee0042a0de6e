"""`anyexperts compile`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, add_config, positive, say


def run(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from anyexperts_jax.aot import search, step, step_tables
    from anyexperts_jax.aot.fit import require_fits
    from anyexperts_jax.aot.topology import use_no_device
    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.train.config import load_config

    console = Console(highlight=False)
    config = load_config(options.config, options.set, options.plugin)
    use_no_device()
    if options.search:
        say(f"compiling train steps of {options.config} for {options.topology}; nothing runs")
        tried = search.search(config, options.topology, options.slices, options.limit, note=say)
        print_tables([search.search_table(tried, options.topology)], console)
        figures: object = search.search_json(tried)
    else:
        say(f"compiling the train step of {options.config} for {options.topology}; nothing runs")
        compiled = step.compile_step(config, options.topology, options.slices)
        print_tables(step_tables.step_tables(compiled), console)
        figures = step_tables.to_json(compiled)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {options.json}")
    if not options.search:
        require_fits(config, options.topology, compiled.mesh, compiled.memory, compiled.hbm)


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "compile",
        "compile the train step for TPUs or GPUs that are not attached",
        (
            "anyexperts compile tiny --topology v5e:2x4",
            "anyexperts compile small --topology h100:2x8 --set mesh.fsdp=16 --json step.json",
            "anyexperts compile small --topology v5e:4x4 --search --limit 8",
        ),
    )
    add_config(parser)
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:8x8x8, h100:2x8, ...")
    parser.add_argument("--slices", type=positive, default=1, help="number of slices; see mesh.dcn_data")
    parser.add_argument("--search", action="store_true", help="try meshes and remat policies, and rank those that fit")
    parser.add_argument("--limit", type=positive, default=4, help="how many candidates --search compiles")
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures into this file (default: none)")
    parser.set_defaults(command=run)
