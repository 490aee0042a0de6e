"""`anyexperts train`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_config


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.train import processes
    from anyexperts_jax.train.config import load_config
    from anyexperts_jax.train.loop import train

    config = load_config(options.config, options.set, options.plugin)
    run_dir = options.run or pathlib.Path("runs") / pathlib.Path(options.config).stem
    peers = processes.find_peers(options.processes, options.process_index, options.coordinator)
    if peers is not None:
        processes.connect(peers, config.runtime.peer_timeout)
    result = train(config, run_dir)
    if processes.is_first():
        print(f"run: {result.run_dir}")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train a model, or go on with a run that stopped")
    add_config(parser)
    parser.add_argument("--run", type=pathlib.Path, help="the run's directory (default: runs/CONFIG)")
    many = parser.add_argument_group(
        "several processes", "each runs this command; a Slurm step and GKE's TPU pods are found without these options"
    )
    many.add_argument("--processes", metavar="N|auto", help="how many; auto: ask the cluster (Cloud TPU VMs); 1: alone")
    many.add_argument("--process-index", type=int, metavar="I", help="which one this is, from 0")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.set_defaults(command=run)
