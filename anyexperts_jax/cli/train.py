"""`anyexperts train`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, add_config, add_data, data_overrides, natural


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.train import processes
    from anyexperts_jax.train.config import load_config
    from anyexperts_jax.train.loop import train

    own = data_overrides(options.config, options.data, options.plugin)
    config = load_config(options.config, [*own, *options.set], options.plugin)
    run_dir = options.run or pathlib.Path("runs") / pathlib.Path(options.config).stem
    peers = processes.find_peers(options.processes, options.process_index, options.coordinator)
    if peers is not None:
        processes.connect(peers, config.runtime.peer_timeout)
    result = train(config, run_dir)
    if processes.is_first():
        print(f"run: {result.run_dir}")


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "train",
        "train a model, or resume a run that stopped",
        (
            "anyexperts train tiny --run runs/mine --set optim.lr=1e-3",
            "anyexperts train tiny --data mine=chats.jsonl --set data.packing=first_fit",
            "anyexperts train small --set train.start_from=runs/static --set model.moe.k_max=12",
            "anyexperts train models/attached --data mine=chats.jsonl --set train.trainable=['**/router/**']",
            "anyexperts train small --set mesh.fsdp=4 --processes 2 --process-index 0 --coordinator host0:1234",
        ),
    )
    add_config(parser)
    own = "your own data: a file, pattern, folder or address, which replaces the generated domains or is added to the "
    add_data(parser, f"{own}configuration's own; its format is detected and printed; repeatable")
    parser.add_argument("--run", type=pathlib.Path, help="the run's directory (default: runs/CONFIG)")
    many = parser.add_argument_group(
        "several processes",
        "Each runs this command. A Slurm step and GKE's TPU pods are found without\nthese options.",
    )
    many.add_argument(
        "--processes",
        metavar="N|auto",
        help="how many; auto: ask the cluster (Cloud TPU VMs); 1: a single one (default: as set by the environment)",
    )
    many.add_argument(
        "--process-index", type=natural, metavar="I", help="which one this is, from 0 (default: $JAX_PROCESS_ID)"
    )
    many.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens (default: $JAX_COORDINATOR_ADDRESS)"
    )
    parser.set_defaults(command=run)
