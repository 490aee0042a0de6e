"""Makes one run in its own process: `python -m experiments.reproduce.worker FOLDER CORES`.

FOLDER holds run.json; CORES are the processor cores to use, as in 0,1. They are set before JAX counts cores.
"""

import os
import pathlib
import sys


def main(arguments: list[str]) -> int:
    """Makes the run and returns an exit code of `anyexperts`: 0, 2, 3, 4, 130 or 143."""
    folder, cores = pathlib.Path(arguments[0]), [int(core) for core in arguments[1].split(",")]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    from anyexperts_jax.core.errors import UserError
    from anyexperts_jax.train.stops import RunStoppedError
    from experiments.reproduce.experiment import run_from_json
    from experiments.reproduce.run_folder import RUN_NAME, finish

    try:
        finish(run_from_json((folder / RUN_NAME).read_text()), folder, _say)
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except RunStoppedError as error:
        _say(f"stopped: {error}")
        return error.exit_code
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
