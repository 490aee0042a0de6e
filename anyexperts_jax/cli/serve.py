"""`anyexperts serve`."""

import argparse

from anyexperts_jax.cli.options import (
    adapters_of,
    add_adapters,
    add_command,
    add_model,
    natural,
    positive,
    positive_number,
    say,
)
from anyexperts_jax.core.errors import comma_list


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.serve.run import require_serve

    require_serve()
    from anyexperts_jax.serve.app import Limits
    from anyexperts_jax.serve.model import load_served
    from anyexperts_jax.serve.run import API_KEY, Address, api_key_of, bind, is_loopback, make_service, serve

    key = api_key_of()
    if key is None and not is_loopback(options.host):
        say(f"{options.host} may be reached from other machines and there is no key; set {API_KEY}")
    adapters = adapters_of(options)
    limits = Limits(int(options.max_body_mb * 2**20), options.queue, options.timeout)
    with bind(Address(options.host, options.port)) as listening:
        model = load_served(options.path, options.checkpoint, options.max_budget, options.name, adapters=adapters)
        service = make_service(model, slots=options.slots, length=options.length, limits=limits, api_key=key, note=say)
        serve(service, listening, lambda url: say(f"serving {comma_list([model.name, *model.adapters])} at {url}"))
    say("stopped: every request that was taken is answered")


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "serve",
        "answer OpenAI's requests with a run or a published checkpoint, each request at its own budget",
        (
            "anyexperts serve models/Qwen3-30B-A3B --port 8000 --slots 16 --length 4096",
            "anyexperts serve runs/mine --name mine --max-budget 9.6",
            "anyexperts serve models/Qwen3-30B-A3B --adapter law=adapters/law --adapter code=adapters/code",
        ),
    )
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of the machine's")
    parser.add_argument("--port", type=natural, default=8000, help="port to listen on; 0: a free one, which is printed")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    add_adapters(parser, "a low-rank adapter, used for requests whose model is NAME; repeatable (default: none)")
    parser.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="checkpoint of a run: the one of lowest validation loss, or the latest",
    )
    parser.add_argument(
        "--max-budget",
        type=positive_number,
        metavar="K",
        help="largest budget, in real experts per token, that a request may ask for (default: the model's own window)",
    )
    parser.add_argument("--slots", type=positive, default=8, metavar="N", help="number of requests that run at once")
    parser.add_argument(
        "--length",
        type=positive,
        metavar="T",
        help="largest number of tokens of a prompt and its answer (default: the model's positions, at most 2048)",
    )
    parser.add_argument("--queue", type=natural, default=64, metavar="N", help="requests that may wait for a slot")
    parser.add_argument(
        "--timeout", type=positive_number, default=600.0, metavar="S", help="seconds a request may take"
    )
    parser.add_argument(
        "--max-body-mb",
        type=positive_number,
        default=8.0,
        metavar="MB",
        help="largest request body, media included, in MiB",
    )
    parser.set_defaults(command=run)
