"""Running single layers in tests: compiled once per module, fast to compile rather than fast to run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from typecheck import unchecked

FAST_COMPILE = {"xla_backend_optimization_level": 0}


@functools.cache
def run(module, method="__call__"):
    """(params, *args, **kwargs) -> the module's result, jitted."""

    def apply(params, *args, rngs=None, **kwargs):
        return module.apply({"params": params}, *args, rngs=rngs, method=method, **kwargs)

    return jax.jit(apply, compiler_options=FAST_COMPILE)


def shapes(module, *args, **kwargs):
    """The module's parameters as ShapeDtypeStructs."""
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda node: hasattr(node, "names"))


def random_params(module, *args, seed=0, scale=0.4, **kwargs):
    """Parameters with no zeros among them: a zero initialisation hides what it multiplies."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(np.asarray(rng.normal(size=p.shape) * scale, p.dtype)), shapes(module, *args, **kwargs)
    )


def initial_params(module, *args, seed=0, **kwargs):
    """The module's own initial parameters."""
    init = jax.jit(lambda key: module.init(key, *args, **kwargs)["params"], compiler_options=FAST_COMPILE)
    return jax.tree.map(lambda box: box.value, init(jax.random.key(seed)), is_leaf=lambda n: hasattr(n, "names"))


def without_type_check(cls):
    """A Flax module without the tests' run-time type check of its call, so that it sees wrong types and shapes."""
    return type(cls.__name__, (cls,), {"__call__": nn.compact(unchecked(cls.__call__))})


def equations(jaxpr):
    """All equations of a jaxpr, including those of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner))
