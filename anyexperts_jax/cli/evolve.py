"""`anyexperts evolve`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, add_data, add_set, data_overrides, say


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.evolution.config import STAGES, load_evolve_config
    from anyexperts_jax.evolution.stages import evolve

    own = data_overrides(options.config, options.data, evolves=True)
    run = load_evolve_config(options.config, [*own, *options.set])
    root = options.run or pathlib.Path("runs") / pathlib.Path(options.config).stem
    for name, result in evolve(run, root, tuple(options.stage or STAGES), note=say).items():
        print(f"{name}: {result.run_dir}, step {result.step}, validation loss {result.validation['loss']:.3f}")
        for expert, found in result.validation.get("experts", {}).items():
            print(f"  {expert} alone: loss {found['loss']:.3f}, {found['distance']:.1e} of expert_1's norm from it")


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "evolve",
        "run EvoMoE: train a dense model, evolve experts from it and train a router for them",
        (
            "anyexperts evolve evolve_tiny --run runs/evolve",
            "anyexperts evolve evolve_tiny --run runs/evolve --stage routing --set evolve.trains=all",
            "anyexperts evolve models/Qwen3-0.6B --data mine=chats.jsonl --set evolve.moe.router=linear",
        ),
    )
    parser.add_argument(
        "config", help="a preset (evolve_tiny, evolve_smoke), a TOML file, a run, or a published dense model"
    )
    add_set(parser, "override, as in evolve.trains=all; repeatable; `anyexperts config CONFIG` lists all keys")
    add_data(parser, "your own data, as for `anyexperts train`; repeatable")
    parser.add_argument("--run", type=pathlib.Path, help="the run's directory (default: runs/CONFIG)")
    parser.add_argument("--stage", nargs="+", help="stages to run: warm_up, evolving, routing (default: all, in order)")
    parser.set_defaults(command=run)
