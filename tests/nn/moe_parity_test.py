"""The layer against three families of transformers: values, chosen experts and gradients, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import AnyExpertsConfig, MoE

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

B, T, D, F, E, K = 3, 40, 16, 12, 8, 3  # 2 F is not D: a transposed weight cannot pass for one that is not


def numbers(tensor):
    return jnp.asarray(tensor.detach().numpy())


def randomised(layer):
    """The layer in float32, every weight drawn at a scale at which routing and experts matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return layer.eval()


def expert_params(experts):
    gate, up = experts.gate_up_proj[:E].mT.chunk(2, dim=-1)
    return {"w_gate_EDF": numbers(gate), "w_up_EDF": numbers(up), "w_down_EFD": numbers(experts.down_proj[:E].mT)}


def qwen3_moe():
    """Softmax over all experts, weights renormalised over the chosen."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    layer = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
        )
    )
    layer = randomised(layer)
    params = {"router": {"kernel": numbers(layer.gate.weight.T)}, "experts": expert_params(layer.experts)}
    return layer, layer.gate, MoE(AnyExpertsConfig.static_top_k(E, K), F), params, None


def deepseek_v3():
    """Sigmoid scores, a bias on the choice alone, two of four groups, a scaling factor, two shared experts."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    sizes = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K}
    policy = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    layer = randomised(DeepseekV3MoE(DeepseekV3Config(**sizes, **policy, n_shared_experts=2)))
    layer.gate.e_score_correction_bias.copy_(0.3 * torch.randn(E))
    config = AnyExpertsConfig.static_top_k(
        E, K, scores="sigmoid", selection="scores", expert_bias=True, num_groups=4, groups_kept=2, scaling_factor=2.5
    )
    shared = layer.shared_experts
    params = {
        "router": {"kernel": numbers(layer.gate.weight.T)},
        "experts": expert_params(layer.experts),
        "shared": {
            name: {"kernel": numbers(getattr(shared, f"{name}_proj").weight.T)} for name in ("gate", "up", "down")
        },
    }
    return layer, layer.gate, MoE(config, F, num_shared_experts=2), params, layer.gate.e_score_correction_bias


def longcat_flash():
    """Five experts that cost nothing and pass their input on, no cap on them, weights as the softmax gives them."""
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    virtual = 5
    sizes = {"hidden_size": D, "expert_ffn_hidden_size": F, "n_routed_experts": E, "zero_expert_num": virtual}
    policy = {"moe_topk": K, "num_experts_per_tok": K, "routed_scaling_factor": 6.0, "router_bias": False}
    layer = randomised(LongcatFlashMoE(LongcatFlashConfig(**sizes, **policy)))
    layer.router.e_score_correction_bias.copy_(0.02 * torch.randn(E + virtual))
    config = AnyExpertsConfig.static_top_k(
        E,
        K,
        num_virtual=virtual,
        rho_max=5 / 13,
        cap_rounding="off",
        virtual_logits="unbiased",
        selection="scores",
        expert_bias=True,
        normalisation="none",
        scaling_factor=6.0,
    )
    params = {
        "router": {"kernel": numbers(layer.router.classifier.weight.T)},
        "experts": expert_params(layer.experts),
    }
    return layer, layer.router, MoE(config, F), params, layer.router.e_score_correction_bias


@pytest.mark.parametrize("family", [qwen3_moe, deepseek_v3, longcat_flash], ids=lambda family: family.__name__)
def test_a_layer_is_transformers(family):
    layer, router, moe, params, bias = family()
    bias_C = None if bias is None else numbers(bias)
    rng = np.random.default_rng(0)
    x_BTD, d_y_BTD = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))

    @jax.jit
    def run(params, x_BTD):
        y_BTD, trace = moe.apply({"params": params}, x_BTD, bias_C=bias_C)
        return (y_BTD * d_y_BTD).sum(), (y_BTD, trace)

    (_, (y_BTD, trace)), (d_params, d_x_BTD) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, x_BTD)
    x = torch.tensor(x_BTD, requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(d_y_BTD))
    chosen_NK = router(x)[2].numpy()

    ours_NK = trace.expert_ids_BTK.reshape(B * T, K)
    np.testing.assert_array_equal(np.sort(ours_NK), np.sort(np.minimum(chosen_NK, E)))
    if family is longcat_flash:  # among its tokens are some of every number of real experts
        assert set((chosen_NK < E).sum(axis=1)) == {0, 1, 2, 3}
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(y_BTD, y.detach().numpy(), **close)
    np.testing.assert_allclose(d_x_BTD, x.grad.numpy(), **close)
    d_router = dict(router.named_parameters())[("classifier." if family is longcat_flash else "") + "weight"].grad
    np.testing.assert_allclose(d_params["router"]["kernel"], d_router.T, **close)
    d_gate_up = np.concatenate([d_params["experts"][name] for name in ("w_gate_EDF", "w_up_EDF")], axis=-1)
    np.testing.assert_allclose(d_gate_up, layer.experts.gate_up_proj.grad[:E].mT, **close)
    np.testing.assert_allclose(d_params["experts"]["w_down_EFD"], layer.experts.down_proj.grad[:E].mT, **close)
