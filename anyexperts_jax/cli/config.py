"""`anyexperts config`."""

import argparse

from anyexperts_jax.cli.options import add_command, add_plugin, add_set


def run(options: argparse.Namespace) -> None:
    import json

    from anyexperts_jax.evolution.config import EvolveConfig, describes_evolution, load_evolve_config
    from anyexperts_jax.train.config import RunConfig, load_config, run_config
    from anyexperts_jax.train.config_files import with_overrides
    from anyexperts_jax.train.reference import describe, to_toml

    run_table = describe(RunConfig())
    overrides = [*options.set, *([f"plugins={json.dumps(options.plugin)}"] if options.plugin else [])]
    if options.config is not None and describes_evolution(options.config):
        evolve_run = load_evolve_config(options.config, overrides)
        parts = [(evolve_run.base, run_table), (evolve_run.evolve, describe(EvolveConfig(), "evolve"))]
    elif options.config is not None:
        parts = [(load_config(options.config, overrides), run_table)]
    else:
        parts = [(run_config("the defaults", with_overrides({}, overrides)), run_table)]
    print(to_toml(parts, options.only), end="")


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "config",
        "print every key of a configuration with its value, type, default and meaning, as a TOML file",
        (
            "anyexperts config tiny",
            "anyexperts config runs/mine --only optim train.steps",
            "anyexperts config small --set mesh.fsdp=4 > mine.toml",
        ),
    )
    parser.add_argument(
        "config",
        nargs="?",
        help="a preset (tiny, small, smoke, evolve_tiny, evolve_smoke), a TOML file, or a run (default: the defaults)",
    )
    add_set(parser, "override, as in optim.lr=1e-3; repeatable")
    add_plugin(parser)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="KEY",
        help="only these keys or tables, for example optim or train.steps (default: all)",
    )
    parser.set_defaults(command=run)
