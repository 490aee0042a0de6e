"""`Differentiable`: a function with a custom backward pass, whose other derivatives come from a plain definition.

`jax.custom_vjp` supports first-order reverse mode only: `jvp` and everything built on it raises an error. Here
`jax.grad` runs the same program as under `custom_vjp`. For all other derivatives (`jvp`, `jacfwd`, `hessian`, gradients
of gradients) JAX differentiates a plain definition of the function. Without a definition, one line says what to use
instead.

How it works: the function is a `jax.custom_jvp` whose tangent is computed by a custom primitive, linear in the tangents
of the operands. Forward mode evaluates the primitive, which gives the tangent of the definition. Reverse mode
transposes it, which gives the custom backward pass. The forward pass sees its operands through `stop_gradient`, so JAX
never differentiates its loops and kernels. Higher orders flow through the three steps of `_Derivative`, which take the
operands themselves.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from anyexperts_jax.core.arrays import vary_alike
from anyexperts_jax.core.errors import UserError, require

T = TypeVar("T")
Leaves = Sequence[Any]


class Differentiable(Generic[T]):
    """A function `run(*operands, *static)`: operands are pytrees of arrays, the last `num_static` parameters static.

    Use it like `jax.custom_vjp`: as a decorator, followed by `defvjp`.
    """

    def __init__(self, run: Callable[..., T], num_static: int = 0) -> None:
        self.run = run
        self.num_static = num_static
        self.rules: _Rules | None = None
        self.signature = inspect.signature(run)
        functools.update_wrapper(self, run)

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any], **beyond: Any) -> None:
        """Sets the derivatives.

        Args:
          forward: (*operands, *static) -> (what `run` returns, residuals).
          backward: (*static, residuals, gradients of the outputs) -> a tuple of the operands' gradients, None for an
            operand that has none.
          beyond: the other fields of `_Rules`.
        """
        self.rules = _Rules(forward, backward, **beyond)

    def __call__(self, *args: Any, **named: Any) -> T:
        assert self.rules is not None, f"{self.run} has no derivatives yet"
        bound = self.signature.bind(*args, **named)
        bound.apply_defaults()
        args = bound.args
        count = len(args) - self.num_static
        leaves, tree = jax.tree.flatten(args[:count])
        call = _Call(self.run, self.rules, args[count:], tree)
        run = jax.custom_jvp(call.run_on)
        run.defjvp(call.differentiate, symbolic_zeros=True)
        return run(*vary_alike(leaves))


def linear(
    function: Callable[..., jax.Array], transpose: Callable[..., jax.Array], x: jax.Array, *fixed: Any
) -> jax.Array:
    """`function(x, *fixed)`, which is linear in x and has no derivative by `fixed`, with its transpose.

    Its backward pass gets `fixed` alone. A `Differentiable` gets x as well, so that a rematerialised forward pass would
    compute x again.

    Args:
      transpose: (gradient of the result, *fixed) -> gradient of x.
    """
    leaves, tree = jax.tree.flatten(fixed)
    given = vary_alike([x, *leaves])

    def evaluate(values: Leaves) -> list[Any]:
        return [function(values[0], *jax.tree.unflatten(tree, values[1:]))]

    def differentiate(values: Leaves, tangents: Leaves) -> Sequence[Any]:
        if not _moving(tangents[:1]):
            return [SymbolicZero(aval.to_tangent_aval()) for aval in avals]
        return step.bind([tangents[0], *values[1:]], avals)

    def gradients(values: Leaves, gradients: Leaves) -> list[Any]:
        return [transpose(gradients[0], *jax.tree.unflatten(tree, values[1:])), *[None] * (len(values) - 1)]

    avals = tuple(jax.make_jaxpr(evaluate)(given).out_avals)
    step = _Step(evaluate, differentiate, gradients)
    return step.bind(given, avals)[0]


@dataclasses.dataclass(frozen=True)
class _Rules:
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    # `run` in operations that JAX can differentiate any number of times. None: only `jax.grad` works.
    definition: Callable[..., Any] | None = None
    # The message of the `UserError` for forward mode and, without a definition, for everything but `jax.grad`. Empty:
    # forward mode is allowed.
    refusal: str = ""
    # JAX differentiates `forward` and `backward` for derivatives of the gradients, instead of the definition.
    plain_backward: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One call of a `Differentiable`, as functions of its operands' leaves."""

    run: Callable[..., Any]
    rules: _Rules
    static: tuple[Any, ...]
    tree: Any  # of the operands

    def operands(self, leaves: Leaves) -> tuple[Any, ...]:
        return jax.tree.unflatten(self.tree, leaves)

    def run_on(self, *leaves: Any) -> Any:
        return self.run(*self.operands(leaves), *self.static)

    def differentiate(self, leaves: Leaves, tangents: Leaves) -> tuple[Any, Any]:
        """The rule of the `custom_jvp`: (outputs, their tangents)."""
        out, derivative, kept = self.forward(leaves)
        attached = derivative.attach(leaves, out)
        # A residual that is also an output is replaced by that output: a scan would store a second copy of it.
        kept = [own if (place := _place(out, own)) is None else attached[place] for own in kept]
        out_tangents = derivative.tangents([*leaves, *kept], attached, tangents, self.rules.refusal)
        return tuple(jax.tree.unflatten(derivative.out_tree, own) for own in (attached, out_tangents))

    def forward(self, leaves: Leaves) -> tuple[list[Any], "_Derivative", list[Any]]:
        """(outputs without a derivative, the derivative, residuals that are not operands)."""
        fixed = leaves if self.rules.plain_backward else [jax.lax.stop_gradient(leaf) for leaf in leaves]
        out, residuals = self.rules.forward(*self.operands(fixed), *self.static)
        out_leaves, out_tree = jax.tree.flatten(out)
        residual_leaves, residual_tree = jax.tree.flatten(residuals)
        places = tuple(_place(fixed, own) for own in residual_leaves)
        kept = [own for own, place in zip(residual_leaves, places, strict=True) if place is None]
        return out_leaves, _Derivative(self, len(leaves), places, residual_tree, out_tree), kept

    def definition(self, leaves: Leaves, moving: tuple[int, ...]) -> Callable[..., list[Any]]:
        """The definition as a function of the `moving` leaves, those it is differentiated by.

        Raises:
          UserError: if there is no definition.
        """
        definition = self.rules.definition
        if definition is None:
            raise UserError(self.rules.refusal)

        def defined(*values: Any) -> list[Any]:
            operands = self.operands(_replaced(leaves, moving, values))
            return jax.tree.leaves(definition(*operands, *self.static))

        return defined


@dataclasses.dataclass(frozen=True, eq=False)
class _Derivative:
    """The derivative at a point: the leaves of the operands, then the residuals that are not among these leaves."""

    call: _Call
    num_leaves: int
    places: tuple[int | None, ...]  # for each residual the leaf that it is, or None: the next one of `kept`
    residual_tree: Any
    out_tree: Any

    def tangents(self, point: Leaves, out: Leaves, tangents: Leaves, refusal: str = "") -> list[Any]:
        """The tangents of the outputs, linear in those of the operands. Evaluating them raises `refusal`, if any."""
        count, moving = len(point), _moving(tangents)
        avals = tuple(jax.typeof(leaf).to_tangent_aval() for leaf in out)
        if not moving:
            return [SymbolicZero(aval) for aval in avals]

        def forward(values: Leaves) -> list[Any]:
            require(not refusal, refusal)
            leaves, given = values[: self.num_leaves], values[count:]
            return jax.jvp(self.call.definition(leaves, moving), [leaves[i] for i in moving], list(given))[1]

        def differentiate(values: Leaves, tangents: Leaves) -> list[Any]:
            point, given, terms = values[:count], values[count:], []
            if _moving(tangents[count:]):
                # The step is linear in the given tangents, so its tangent is the step itself: one backward pass.
                d_given = [_instantiate(*pair) for pair in zip(given, tangents[count:], strict=True)]
                terms.append(step.bind([*point, *d_given], avals))
            if _moving(tangents[: self.num_leaves]):
                leaves, kept = point[: self.num_leaves], point[self.num_leaves :]
                at = lambda *leaves: forward([*leaves, *kept, *given])  # noqa: E731
                terms.append(_jvp(at, leaves, tangents[: self.num_leaves]))
            if not terms:
                return [SymbolicZero(aval) for aval in avals]
            return [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]

        def transpose(values: Leaves, gradients: Leaves) -> list[Any]:
            return [None] * count + self.gradients(moving, values[:count], gradients)

        step = _Step(forward, differentiate, transpose)
        return step.bind([*point, *vary_alike([tangents[i] for i in moving])], avals)

    def attach(self, leaves: Leaves, out: Leaves) -> list[Any]:
        """The outputs of the forward pass with their derivative attached.

        The derivative recomputes the residuals. Passing them in would make a rematerialised forward pass compute them
        as well.
        """

        def tangents(leaves: Leaves, out: Leaves, tangents: Leaves) -> list[Any]:
            _, derivative, kept = self.call.forward(leaves)
            return derivative.tangents([*leaves, *kept], out, tangents)

        return _attach(leaves, out, tangents)

    def gradients(self, moving: tuple[int, ...], point: Leaves, gradients: Leaves) -> list[Any]:
        """The gradients of the moving leaves, by the backward pass; their derivatives come from the definition."""
        count = len(point)
        if self.call.rules.plain_backward:
            return self._backward(moving, point, gradients)
        fixed = [jax.lax.stop_gradient(value) for value in (*point, *gradients)]

        def attached(i: int, gradient: Any) -> Any:
            def by_definition(*values: Any) -> Any:
                leaves, gradients = values[: self.num_leaves], values[self.num_leaves :]
                return jax.vjp(self.call.definition(leaves, (i,)), leaves[i])[1](list(gradients))[0]

            def tangents(values: Leaves, _: Leaves, tangents: Leaves) -> list[Any]:
                return _jvp(lambda *values: [by_definition(*values)], values, tangents)

            return _attach([*point[: self.num_leaves], *gradients], [gradient], tangents)[0]

        # Attached one by one, so that JAX can drop the work for gradients that are not used.
        results = self._backward(moving, fixed[:count], fixed[count:])
        return [attached(i, gradient) for i, gradient in zip(moving, results, strict=True)]

    def _backward(self, moving: tuple[int, ...], point: Leaves, gradients: Leaves) -> list[Any]:
        call, kept = self.call, iter(point[self.num_leaves :])
        own = [next(kept) if place is None else point[place] for place in self.places]
        residuals, out_gradients = (
            jax.tree.unflatten(self.residual_tree, own),
            jax.tree.unflatten(self.out_tree, gradients),
        )
        results = call.rules.backward(*call.static, residuals, out_gradients)
        flat: list[Any] = []
        for operand, result in zip(call.operands(point[: self.num_leaves]), results, strict=True):
            flat += [None] * len(jax.tree.leaves(operand)) if result is None else jax.tree.leaves(result)
        return [flat[i] for i in moving]


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """A function of a list of arrays with custom rules for JAX's transformations.

    It is a primitive and not a `custom_jvp`, because JAX 0.10 drops the rule of a `custom_jvp` when it splits a scan.
    """

    evaluate: Callable[[Leaves], Sequence[Any]]  # values -> results
    differentiate: Callable[[Leaves, Leaves], Sequence[Any]]  # (values, tangents) -> the results' tangents
    # (values, gradients of the results) -> gradients of the values
    transpose: Callable[[Leaves, Leaves], Sequence[Any]] | None = None

    def bind(self, values: Leaves, avals: tuple[Any, ...]) -> list[Any]:
        """The results, whose types are `avals`."""
        return list(_step.bind(*values, step=self, avals=avals))

    def batched(self, size: int, axes: Sequence[int | None]) -> "_Step":
        """The step over a batch that lies along `axes` of the values and along the first axis of the results."""
        axes = list(axes)

        def evaluate(values: Leaves) -> Sequence[Any]:
            return jax.vmap(lambda *a: self.evaluate(a), axes, axis_size=size)(*values)

        def differentiate(values: Leaves, tangents: Leaves) -> Sequence[Any]:
            moving = _moving(tangents)
            still = [SymbolicZero(jax.typeof(value).to_tangent_aval()) for value in values]

            def one(values: Leaves, moved: Leaves) -> Sequence[Any]:
                return self.differentiate(values, _replaced(still, moving, moved))

            in_axes = (axes, [axes[i] for i in moving])
            return jax.vmap(one, in_axes, axis_size=size)(list(values), [tangents[i] for i in moving])

        def transpose(values: Leaves, gradients: Leaves) -> Sequence[Any]:
            assert self.transpose is not None
            place = [i for i, value in enumerate(values) if not ad.is_undefined_primal(value)]

            def one(known: Leaves, gradients: Leaves) -> Sequence[Any]:
                return self.transpose(_replaced(values, tuple(place), known), gradients)  # type: ignore[misc]

            in_axes = ([axes[i] for i in place], 0)
            results = jax.vmap(one, in_axes, axis_size=size)([values[i] for i in place], list(gradients))
            each = zip(results, axes, strict=True)
            return [None if own is None else _unbatched(own, axis) for own, axis in each]

        return _Step(evaluate, differentiate, None if self.transpose is None else transpose)


def _unbatched(gradient: Any, axis: int | None) -> Any:
    """The gradient of a value batched along `axis`, from a batch of gradients; None: a value that the batch shares."""
    return gradient.sum(0) if axis is None else jnp.moveaxis(gradient, 0, axis)


def _attach(point: Leaves, out: Leaves, tangents: Callable[[Leaves, Leaves, Leaves], Sequence[Any]]) -> list[Any]:
    """Returns `out` unchanged but differentiable by `point`; it was computed behind `stop_gradient`.

    tangents: (point, out, tangents of the point) -> the tangents of `out`.
    """
    count = len(point)

    def differentiate(values: Leaves, d_values: Leaves) -> Sequence[Any]:
        return tangents(values[:count], _attach(values[:count], values[count:], tangents), d_values[:count])

    step = _Step(lambda values: list(values[count:]), differentiate)
    return step.bind([*point, *out], tuple(jax.typeof(leaf) for leaf in out))


_step = Primitive("differentiable_step")
_step.multiple_results = True


def _evaluate(*values: Any, step: _Step, avals: Any) -> Sequence[Any]:
    del avals
    return step.evaluate(values)


def _differentiate(values: Leaves, tangents: Leaves, *, step: _Step, avals: Any) -> tuple[Any, Any]:
    results = step.differentiate(values, tangents)
    zeros = [ad.Zero(own.aval) if isinstance(own, SymbolicZero) else own for own in results]
    return step.bind(values, avals), zeros


def _transpose(gradients: Leaves, *values: Any, step: _Step, avals: Any) -> Sequence[Any]:
    del avals
    assert step.transpose is not None
    results = step.transpose(values, [ad.instantiate_zeros(gradient) for gradient in gradients])
    each = zip(values, results, strict=True)
    return [own if ad.is_undefined_primal(value) else None for value, own in each]


def _batch(values: Leaves, axes: Sequence[int | None], *, step: _Step, avals: Any) -> tuple[Any, Any]:
    size = next(value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None)
    out = step.batched(size, axes).bind(values, tuple(unmapped_aval(size, 0, aval) for aval in avals))
    return out, [0] * len(out)


_step.def_impl(_evaluate)
_step.def_abstract_eval(lambda *_, step, avals: avals)
ad.primitive_jvps[_step] = _differentiate
ad.primitive_transposes[_step] = _transpose
batching.primitive_batchers[_step] = _batch
mlir.register_lowering(_step, mlir.lower_fun(_evaluate, multiple_results=True))


def _moving(tangents: Leaves) -> tuple[int, ...]:
    """Indices of the tangents that are not trivially zero: neither symbolic zeros nor those of integers."""

    def stands(tangent: Any) -> bool:
        return isinstance(tangent, (SymbolicZero, ad.Zero)) or tangent.dtype == jax.dtypes.float0

    return tuple(i for i, tangent in enumerate(tangents) if not stands(tangent))


def _place(leaves: Leaves, own: Any) -> int | None:
    return next((i for i, leaf in enumerate(leaves) if leaf is own), None)


def _instantiate(value: Any, tangent: Any) -> Any:
    return tangent if _moving([tangent]) else jnp.zeros_like(value)


def _jvp(function: Callable[..., Any], values: Leaves, tangents: Leaves) -> list[Any]:
    """`jax.jvp` of `function` if some arguments may have no tangent; returns only the tangents."""
    moving = _moving(tangents)

    def of_moving(*moved: Any) -> Any:
        return function(*_replaced(values, moving, moved))

    return jax.jvp(of_moving, [values[i] for i in moving], [tangents[i] for i in moving])[1]


def _replaced(leaves: Leaves, places: tuple[int, ...], values: Leaves) -> list[Any]:
    by_place = dict(zip(places, values, strict=True))
    return [by_place.get(i, leaf) for i, leaf in enumerate(leaves)]
