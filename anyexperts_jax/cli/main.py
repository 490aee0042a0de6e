"""The command line: `anyexperts train | evolve | evaluate | report | generate | serve | import | export |
attach | split | upcycle | config | data | tokenizer | bench | compile`.

Each command only reads its arguments and calls one function. Exit codes: 0 done; 2 an invalid input, or a file that
cannot be used; 3 a loss that is not finite; 4 a full disk; 5 another process of the run has died; 130 and 143
interrupted, with a checkpoint written.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from anyexperts_jax import __version__
from anyexperts_jax.cli import (
    attach,
    bench,
    compile,
    config,
    data,
    evaluate,
    evolve,
    export,
    generate,
    import_checkpoint,
    report,
    serve,
    split,
    tokenizer,
    train,
    upcycle,
)
from anyexperts_jax.cli.options import Parser
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.files import require_local

SECONDS_FOR_THE_SAME_ERROR = 2.0  # the other processes have this long to report it too
OUTPUTS = ("folder", "out", "json", "run", "runs")  # options that name where a command writes
EXAMPLES = """examples:
  anyexperts train tiny --run runs/mine
  anyexperts evaluate runs/mine --budget 4.8 8.0
  anyexperts report runs/mine
  anyexperts config tiny        every key of a configuration, with its value and meaning
  anyexperts train --help       a command's options"""
COMMANDS = (
    train,
    evolve,
    evaluate,
    report,
    generate,
    serve,
    import_checkpoint,
    export,
    attach,
    split,
    upcycle,
    config,
    data,
    tokenizer,
    bench,
    compile,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    return run_command(_parser().parse_args(arguments))


def run_command(options: argparse.Namespace) -> int:
    """Runs `options.command` and returns its exit code; an error that the user can cause is one line on stderr."""
    from anyexperts_jax.train.stops import RunStoppedError, file_failure, memory_failure

    try:
        if "processes" in options and options.command is not train.run:
            from anyexperts_jax.train.processes import require_alone

            require_alone(options.processes)
        _require_local_paths(options)
        options.command(options)
    except UserError as error:
        code = _fail(str(error), 2)
        _exit_without_waiting(code, SECONDS_FOR_THE_SAME_ERROR)
        return code
    except RunStoppedError as error:
        code = _fail(str(error), error.exit_code)
        if error.alone:
            _exit_without_waiting(code)
        return code
    except (OSError, RuntimeError, MemoryError) as error:
        output = next(filter(None, (getattr(options, name, None) for name in OUTPUTS)), None)
        failure = memory_failure(error) or file_failure(error, output)
        if failure is None:
            raise
        code = _fail(*failure)
        _exit_without_waiting(code, SECONDS_FOR_THE_SAME_ERROR)
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"anyexperts: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _require_local_paths(options: argparse.Namespace) -> None:
    """Checks every option that is a path, before any of them is used.

    Raises:
      UserError: if one is the address of an object store.
    """
    for name, value in vars(options).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, pathlib.Path):
                require_local(path, name)


def _exit_without_waiting(code: int, after: float = 0.0) -> None:
    """Ends this process of a multi-process run after `after` seconds.

    At a regular exit JAX would wait for the other processes, which may not know of the error.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        time.sleep(after)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="anyexperts",
        description="Mixture-of-experts models in which each token gets as many experts as it needs.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"anyexperts-jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    for name in ("evolve", "evaluate", "report", "generate"):
        commands.choices[name].add_argument(
            "--processes",
            metavar="1",
            help="1: run as a single process (default: as set by the environment)",
        )
    return parser
