"""Training: the run configuration, the pure train step, checkpoints, logs, and the loop that connects them.

The package can be called: `anyexperts_jax.train(config)` trains a model; `help(anyexperts_jax.evaluate.run.train_run)`.
"""

import sys
import types
from typing import Any


class _Package(types.ModuleType):
    """The package, which is also the function of the public API that has its name.

    Python binds `anyexperts_jax.train` to this package as soon as anything in it is imported, so a function of that
    name could not stay there.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Trains a model and returns it as a `Run`: see `anyexperts_jax.evaluate.run.train_run`."""
        import anyexperts_jax

        return anyexperts_jax.train_run(*arguments, **options)


sys.modules[__name__].__class__ = _Package
