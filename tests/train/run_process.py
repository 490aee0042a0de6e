"""One process of a run, to be killed and signalled: STAND_IN (linear or model), then what `anyexperts` takes."""

import sys

from anyexperts_jax import cli
from anyexperts_jax.train import loop
from train.stand_in import linear_apply

if __name__ == "__main__":
    if sys.argv[1] == "linear":
        loop.model_apply = lambda config, placement: linear_apply
    sys.exit(cli.main(sys.argv[2:]))
