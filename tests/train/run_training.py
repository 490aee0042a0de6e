"""A training run in a process of its own, to be killed and signalled: CONFIG.json RUN_DIR."""

import sys

from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.stops import RunStoppedError

if __name__ == "__main__":
    try:
        train(load_config(sys.argv[1]), sys.argv[2])
    except RunStoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
