"""`anyexperts compile`."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from anyexperts_jax.cli.options import add_command, add_config, natural, positive, positive_number, say

if TYPE_CHECKING:
    from anyexperts_jax.aot.published import PublishedRun


def run(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from anyexperts_jax.aot import search, step, step_tables
    from anyexperts_jax.aot.decode import compile_decode
    from anyexperts_jax.aot.fit import require_fits
    from anyexperts_jax.aot.topology import use_no_device
    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.train.auto_dispatch import auto_choice
    from anyexperts_jax.train.config import load_config

    console = Console(highlight=False)
    published = _published(options)
    config = load_config(options.config, options.set, options.plugin) if published is None else published.run
    use_no_device()
    if published is not None and options.decode:
        say(f"compiling a step of decoding of {options.config} for {options.topology}; nothing runs")
        decoded = compile_decode(config, published.model, options.topology)
        print_tables(step_tables.decode_tables(decoded), console)
        figures: object = step_tables.to_json(decoded)
    elif options.search:
        say(f"compiling train steps of {options.config} for {options.topology}; nothing runs")
        tried = search.search(config, options.topology, options.slices, options.limit, note=say)
        print_tables([search.search_table(tried, options.topology)], console)
        figures = search.search_json(tried)
    else:
        say(f"compiling the train step of {options.config} for {options.topology}; nothing runs")
        compiled = step.compile_step(config, options.topology, options.slices)
        if (choice := auto_choice(config, compiled.mesh)) is not None:
            say(str(choice))
        print_tables(step_tables.step_tables(compiled), console)
        figures = step_tables.to_json(compiled)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {options.json}")
    if not options.search and not options.decode:
        require_fits(config, options.topology, compiled.mesh, compiled.memory, compiled.hbm)


def _published(options: argparse.Namespace) -> "PublishedRun | None":
    """Returns the run for a published model's config.json; None for any other configuration.

    Raises:
      UserError: for options that need a published model, or that exclude each other.
    """
    from anyexperts_jax.aot.published import Slots, is_published_config, published_run
    from anyexperts_jax.core.errors import require

    given = [
        f"--{name}" for name in ("k-min", "k-max", "virtual", "decode") if getattr(options, name.replace("-", "_"))
    ]
    if not is_published_config(options.config):
        require(not given, f"{' '.join(given)}: only with a published model's config.json")
        return None
    both = (options.k_min is None) == (options.k_max is None) and (options.k_min is not None or not options.virtual)
    require(both, "slots are attached with --k-min and --k-max, and --virtual beside them")
    require(not (options.decode and (options.search or options.slices > 1)), "--decode: not with --search or --slices")
    slots = None if options.k_min is None else Slots(options.k_min, options.k_max, options.virtual)
    return published_run(options.config, options.set, slots, trains=not options.decode)


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "compile",
        "compile the train step for TPUs or GPUs that are not attached",
        (
            "anyexperts compile tiny --topology v5e:2x4",
            "anyexperts compile small --topology h100:2x8 --set mesh.fsdp=16 --json step.json",
            "anyexperts compile small --topology v5e:4x4 --search --limit 8",
            "anyexperts compile models/Qwen3-30B-A3B/config.json --k-min 6 --k-max 10 --topology v5p:2x2x1 --decode",
        ),
    )
    add_config(parser)
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:8x8x8, h100:2x8, ...")
    parser.add_argument("--slices", type=positive, default=1, help="number of slices; see mesh.dcn_data")
    parser.add_argument("--search", action="store_true", help="try meshes and remat policies, and rank those that fit")
    parser.add_argument("--limit", type=positive, default=4, help="how many candidates --search compiles")
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures into this file (default: none)")
    group = parser.add_argument_group("with a published model's config.json, without its weights")
    group.add_argument(
        "--k-min",
        type=positive_number,
        metavar="K",
        help="attach slots: so many at importance 0 (default: attach none)",
    )
    group.add_argument(
        "--k-max",
        type=positive_number,
        metavar="K",
        help="attach slots: so many at importance 1 (default: attach none)",
    )
    group.add_argument("--virtual", type=natural, default=0, metavar="V", help="virtual experts per layer")
    group.add_argument(
        "--decode",
        action="store_true",
        help="compile a decoding step for train.batch_size rows and a cache of data.encoding.max_length positions",
    )
    parser.set_defaults(command=run)
