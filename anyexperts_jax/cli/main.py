"""The command line: `anyexperts train | evolve | evaluate | report | generate | data | tokenizer | bench |
compile`.

Thin: each command reads its arguments and calls one function. Exit codes: 0 done, 2 a wrong input or a file that cannot
be used, 3 a loss that is not finite, 4 a full disk, 5 another process of the run gone, 130 and 143 interrupted with a
checkpoint written.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from anyexperts_jax import __version__
from anyexperts_jax.cli import bench, compile, data, evaluate, evolve, generate, report, tokenizer, train
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.files import require_local

SECONDS_FOR_THE_SAME_ERROR = 2.0  # that other processes have to say it as well
OUTPUTS = ("folder", "out", "json", "run", "runs")  # options that say where a command writes
COMMANDS = (train, evolve, evaluate, report, generate, data, tokenizer, bench, compile)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    return run_command(_parser().parse_args(arguments))


def run_command(options: argparse.Namespace) -> int:
    """Runs `options.command` and returns its exit code; an error of the user's ends in one line on stderr."""
    from anyexperts_jax.train.stops import RunStoppedError, file_failure

    try:
        if "processes" in options and options.command is not train.run:
            from anyexperts_jax.train.processes import require_alone

            require_alone(options.processes)
        _require_local_paths(options)
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


def _require_local_paths(options: argparse.Namespace) -> None:
    """Looks at every option that is a path, before any of them is used.

    Raises:
      UserError: for the address of an object store.
    """
    for name, value in vars(options).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, pathlib.Path):
                require_local(path, name)


def _leave_the_others(code: int, after: float = 0.0) -> None:
    """Ends one process of several, `after` seconds: at a regular exit JAX waits for the others, who may not know."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        time.sleep(after)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anyexperts", description="Mixture-of-experts models in which each token gets as many experts as it needs."
    )
    parser.add_argument("--version", action="version", version=f"anyexperts-jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    for name in ("evolve", "evaluate", "report", "generate"):
        commands.choices[name].add_argument("--processes", metavar="1", help="1: alone, whatever the environment says")
    return parser
