import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn.layers import FAST_COMPILE

from anyexperts_jax.routing.routers.base import mixed_logits
from anyexperts_jax.routing.routers.dtr import Hypernetworks, dtr_logits
from anyexperts_jax.routing.routers.linear import per_modality_logits


def weights(M, D, Z, Q, C, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    networks = Hypernetworks(
        draw(M, D, Z), draw(M, Z), draw(M, Z, D, 2 * Q), draw(M, D, 2 * Q), draw(M, Z, Q, D), draw(M, Q, D)
    )
    return networks, draw(D, C)


def zero_weights(M, D, Z, Q, C):
    shapes = ((M, D, Z), (M, Z), (M, Z, D, 2 * Q), (M, D, 2 * Q), (M, Z, Q, D), (M, Q, D))
    return Hypernetworks(*map(jnp.zeros, shapes)), jnp.zeros((D, C))


def tokens(N, D, M, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(N, D)), jnp.float32), jnp.asarray(rng.integers(0, M, N), jnp.int32)


def naive(x_ND, modality_N, networks, phi_DC, gelu=False):
    """Equations 5 to 8 literally: materialises and applies every token's Theta."""
    own = jax.tree.map(lambda w: w[modality_N], networks)
    code_NZ = jnp.einsum("nd,ndz->nz", x_ND, own.encode_MDZ) + own.encode_bias_MZ
    code_NZ = jax.nn.gelu(code_NZ) if gelu else code_NZ
    theta_down_NDW = jnp.einsum("nz,nzdw->ndw", code_NZ, own.down_MZDW) + own.down_bias_MDW
    theta_up_NQD = jnp.einsum("nz,nzqd->nqd", code_NZ, own.up_MZQD) + own.up_bias_MQD
    gate_NQ, up_NQ = jnp.split(jnp.einsum("nd,ndw->nw", x_ND, theta_down_NDW), 2, axis=1)
    return jnp.einsum("nq,nqd,dc->nc", jax.nn.silu(gate_NQ) * up_NQ, theta_up_NQD, phi_DC)


@pytest.mark.parametrize(("M", "gelu"), [(1, False), (2, False), (5, True)])
def test_equals_the_naive_form_and_its_gradients(M, gelu):
    networks, phi_DC = weights(M, D=10, Z=6, Q=3, C=4)
    x_ND, modality_N = tokens(17, 10, M)

    def loss(form, x_ND, networks, phi_DC):
        logits_NC = form(x_ND, modality_N, networks, phi_DC, gelu=gelu)
        return (jax.nn.softmax(logits_NC) * jnp.arange(4.0)[None]).sum(), logits_NC

    run = jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True), static_argnums=0, compiler_options=FAST_COMPILE)
    (_, actual), grads = run(dtr_logits, x_ND, networks, phi_DC)
    (_, expected), expected_grads = run(naive, x_ND, networks, phi_DC)
    assert float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, rtol=2e-4, atol=2e-5)


def test_other_modalities_weights_have_no_part():
    networks, phi_DC = weights(3, D=6, Z=4, Q=2, C=4)
    x_ND, _ = tokens(5, 6, 3)
    modality_N = jnp.asarray([0, 0, 2, 2, 0])
    poisoned = jax.tree.map(lambda w: w.at[1].set(jnp.nan), networks)
    expected = dtr_logits(x_ND, modality_N, networks, phi_DC)
    np.testing.assert_array_equal(dtr_logits(x_ND, modality_N, poisoned, phi_DC), expected)
    assert not np.allclose(expected, dtr_logits(x_ND, 2 - modality_N, networks, phi_DC), atol=1e-2)


def test_no_token_has_a_weight_matrix_of_the_models_width():
    """At width 2048 the naive form needs 2048 x 48 numbers per token; this only compiles."""
    N, M, D, Z, Q, C = 2048, 2, 2048, 128, 16, 4
    inputs = jax.eval_shape(lambda: (*tokens(N, D, M), *zero_weights(M, D, Z, Q, C)))
    networks = inputs[2]

    def one_theta_a_token(x_ND, modality_N, networks, phi_DC):
        """The naive form for one modality, which at least does not gather W2 for every token."""
        network = jax.tree.map(lambda w: w[0], networks)
        code_NZ = x_ND @ network.encode_MDZ
        theta_NDW = jnp.einsum("nz,zdw->ndw", code_NZ, network.down_MZDW) + network.down_bias_MDW[None]
        up_NQD = jnp.einsum("nz,zqd->nqd", code_NZ, network.up_MZQD) + network.up_bias_MQD[None]
        gate_NQ, up_NQ = jnp.split(jnp.einsum("nd,ndw->nw", x_ND, theta_NDW), 2, axis=1)
        return jnp.einsum("nq,nqd->nd", jax.nn.silu(gate_NQ) * up_NQ, up_NQD) @ phi_DC

    def temporaries(form):
        return jax.jit(form).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    def trained(x_ND, modality_N, networks, phi_DC):
        loss = lambda x, n, p: dtr_logits(x, modality_N, n, p).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(x_ND, networks, phi_DC)

    theta = 4 * N * D * 3 * Q
    assert temporaries(one_theta_a_token) > 0.6 * theta
    assert temporaries(dtr_logits) < theta / 6
    gradients = 4 * sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(networks))
    assert temporaries(trained) < theta / 4 + 2 * gradients  # gradients of the weights are as large as the weights


def test_linear_per_modality_and_the_mixture():
    x_ND, modality_N = tokens(9, 4, 3)
    kernel_MDC = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 5)), jnp.float32)
    logits_NC = per_modality_logits(x_ND, modality_N, kernel_MDC)
    for n, m in enumerate(np.asarray(modality_N)):
        np.testing.assert_allclose(logits_NC[n], x_ND[n] @ kernel_MDC[m], atol=1e-5)
    shared_NC = jnp.ones_like(logits_NC)
    np.testing.assert_allclose(mixed_logits(logits_NC, shared_NC, jnp.float32(0)), (logits_NC + 1) / 2, atol=1e-6)
    np.testing.assert_allclose(mixed_logits(logits_NC, shared_NC, jnp.float32(30)), shared_NC, atol=1e-5)
