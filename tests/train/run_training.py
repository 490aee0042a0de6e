"""Training runs in a process of their own, to be killed and signalled: CONFIG.json RUN_DIR..."""

import sys

from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.stops import RunStoppedError

if __name__ == "__main__":
    try:
        for run_dir in sys.argv[2:]:
            train(load_config(sys.argv[1]), run_dir)
    except RunStoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
