"""`route` and gradients through it, compiled: fast to compile rather than fast to run.

One compilation takes half a second; run operation by operation, the first call at a new shape takes several.
"""

import functools

import jax

from anyexperts_jax.routing.route import route

FAST_COMPILE = {"xla_backend_optimization_level": 0}


@functools.cache
def _compiled(config, num_sequences):
    return jax.jit(functools.partial(route, config, num_sequences=num_sequences), compiler_options=FAST_COMPILE)


def routed(config, *arrays, num_sequences=1, **arguments):
    """`route`, compiled once per configuration and shape."""
    return _compiled(config, num_sequences)(*arrays, **arguments)


def gradients(loss, *arguments):
    """The gradients of a scalar function with respect to all its arguments."""
    grad = jax.grad(loss, argnums=tuple(range(len(arguments))))
    return jax.jit(grad, compiler_options=FAST_COMPILE)(*arguments)
