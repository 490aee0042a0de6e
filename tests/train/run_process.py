"""One process of a run, to be killed and signalled: STAND_IN (linear or model), then the arguments of `anyexperts`.

With HANG_IN=CLASS.METHOD in the environment it stops itself with SIGSTOP at the first call of that method.
"""

import os
import signal
import sys

from anyexperts_jax.cli import main as cli
from anyexperts_jax.train import loop
from train.stand_in import linear_apply


def hang_in(place):
    owner, name = place.split(".")
    method = getattr(getattr(loop, owner), name)

    def hanging(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGSTOP)
        return method(*args, **kwargs)

    setattr(getattr(loop, owner), name, hanging)


if __name__ == "__main__":
    if sys.argv[1] == "linear":
        loop.model_apply = lambda config, placement: linear_apply
    if "HANG_IN" in os.environ:
        hang_in(os.environ["HANG_IN"])
    sys.exit(cli.main(sys.argv[2:]))
