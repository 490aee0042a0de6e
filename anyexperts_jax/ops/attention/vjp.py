"""`by_example` over a batch as one differentiable function."""

from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.ops.attention import by_example


class _Residuals(NamedTuple):
    queries_BTHA: Array
    keys_BSGA: Array
    values_BSGW: Array
    mask_BTS: Array
    mean_BTHW: Array
    softmax: by_example.Softmax


@Differentiable
def attention_by_example(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BSGA: Float[Array, "B S G A"],
    values_BSGW: Float[Array, "B S G W"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H W"]:
    return _forward(queries_BTHA, keys_BSGA, values_BSGW, mask_BTS)[0]


def _forward(queries_BTHA: Array, keys_BSGA: Array, values_BSGW: Array, mask_BTS: Array) -> tuple[Array, _Residuals]:
    kv_heads, dtype = keys_BSGA.shape[2], queries_BTHA.dtype

    def run(example: tuple[Array, ...]) -> tuple[Array, by_example.Softmax]:
        queries_THA, keys_SGA, values_SGW, mask_TS = example
        operands = _grouped(queries_THA, kv_heads), _heads_first(keys_SGA), _heads_first(values_SGW)
        mean_GJTW, softmax = by_example.forward(*operands, mask_TS)
        return _flat(mean_GJTW).astype(dtype), softmax

    operands = (queries_BTHA, keys_BSGA, values_BSGW, mask_BTS)
    mean_BTHW, softmax = lax.map(run, operands)  # a loop and not vmap, so that one example's scores stay in the cache
    return mean_BTHW, _Residuals(*operands, mean_BTHW, softmax)


def _backward(residuals: _Residuals, d_mean_BTHW: Array) -> tuple[Array | None, ...]:
    kv_heads, dtype = residuals.keys_BSGA.shape[2], residuals.queries_BTHA.dtype

    def run(example: tuple[_Residuals, Array]) -> tuple[Array, ...]:
        (queries_THA, keys_SGA, values_SGW, mask_TS, mean_THW, softmax), d_mean_THW = example
        d_queries_GJTA, d_keys_GSA, d_values_GSW = by_example.backward(
            _grouped(queries_THA, kv_heads),
            _heads_first(keys_SGA),
            _heads_first(values_SGW),
            mask_TS,
            _grouped(mean_THW, kv_heads),
            softmax,
            _grouped(d_mean_THW.astype(dtype), kv_heads),
        )
        gradients = _flat(d_queries_GJTA), d_keys_GSA.swapaxes(0, 1), d_values_GSW.swapaxes(0, 1)
        return tuple(gradient.astype(dtype) for gradient in gradients)

    return *lax.map(run, (residuals, d_mean_BTHW)), None


attention_by_example.defvjp(_forward, _backward, definition=attention_by_example.run)


def _grouped(a_THA: Float[Array, "T H A"], kv_heads: int) -> Float[Array, "G J T A"]:
    length, heads, width = a_THA.shape
    return a_THA.reshape(length, kv_heads, heads // kv_heads, width).transpose(1, 2, 0, 3)


def _flat(a_GJTA: Float[Array, "G J T A"]) -> Float[Array, "T H A"]:
    kv_heads, shared, length, width = a_GJTA.shape
    return a_GJTA.transpose(2, 0, 1, 3).reshape(length, kv_heads * shared, width)


def _heads_first(a_SGA: Float[Array, "S G A"]) -> Float[Array, "G S A"]:
    return a_SGA.swapaxes(0, 1)
