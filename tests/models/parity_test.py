"""The decoder against transformers' Qwen3-MoE with the same weights: logits, the loss's gradient, greedy answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import AnyExpertsConfig
from anyexperts_jax.bench.step import text_batch
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.generate import generate
from anyexperts_jax.models.init import abstract_params
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.nn.config import AttentionConfig, StackConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CONFIG = ModelConfig(
    vocab_size=40,
    max_length=24,
    pad_id=38,
    eos_id=39,
    stack=StackConfig(
        d_model=16,
        num_layers=3,
        d_ff=24,
        expert_d_ff=12,
        num_shared_experts=0,
        norm_eps=1e-5,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=5000.0, qk_norm=True),
    ),
    moe=AnyExpertsConfig.static_top_k(6, 2),
    vision=None,
    audio=None,
)
LENGTHS = (20, 13, 1)


@pytest.fixture(scope="module")
def theirs():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    stack, attention = CONFIG.stack, CONFIG.stack.attention
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=stack.d_model,
            num_hidden_layers=stack.num_layers,
            mlp_only_layers=list(range(stack.num_dense_layers)),
            intermediate_size=stack.d_ff,
            moe_intermediate_size=stack.expert_d_ff,
            num_experts=CONFIG.moe.num_experts,
            num_experts_per_tok=CONFIG.moe.slots_bound,
            norm_topk_prob=True,
            num_attention_heads=attention.num_heads,
            num_key_value_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
            rms_norm_eps=stack.norm_eps,
            tie_word_embeddings=False,
            pad_token_id=CONFIG.pad_id,
            eos_token_id=CONFIG.eos_id,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5)
            weight += 1.0 if name.endswith("norm.weight") else 0.0
    return model.eval()


def in_our_tree(named):
    """Arrays by transformers' names, as the tree of our parameters; works for weights and for gradients."""
    own = {name: tensor.detach().numpy() for name, tensor in named}
    width, attention = CONFIG.stack.d_model, CONFIG.stack.attention

    def kernel(name):
        return own[f"{name}.weight"].T

    def norm(name):
        return {"scale": own[f"{name}.weight"]}

    def heads(name):
        return {"kernel": kernel(name).reshape(width, -1, attention.head_dim)}

    def self_attention(layer):
        at = f"{layer}.self_attn"
        return {
            "norm": norm(f"{layer}.input_layernorm"),
            "attention": {
                **{ours: heads(f"{at}.{ours[0]}_proj") for ours in ("query", "key", "value")},
                "query_norm": norm(f"{at}.q_norm"),
                "key_norm": norm(f"{at}.k_norm"),
                "out": {"kernel": kernel(f"{at}.o_proj").reshape(-1, attention.head_dim, width)},
            },
        }

    def dense(layer):
        mlp = {name: {"kernel": kernel(f"{layer}.mlp.{name}_proj")} for name in ("gate", "up", "down")}
        return {"self_attention": self_attention(layer), "norm": norm(f"{layer}.post_attention_layernorm"), "mlp": mlp}

    def moe(layer):
        gate, up = np.split(own[f"{layer}.mlp.experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
        down = own[f"{layer}.mlp.experts.down_proj"].swapaxes(1, 2)
        experts = {"w_gate_EDF": gate, "w_up_EDF": up, "w_down_EFD": down}
        return {
            "self_attention": self_attention(layer),
            "norm": norm(f"{layer}.post_attention_layernorm"),
            "moe": {"router": {"kernel": kernel(f"{layer}.mlp.gate")}, "experts": experts},
        }

    layers = [f"model.layers.{i}" for i in range(CONFIG.stack.num_layers)]
    first = CONFIG.stack.num_dense_layers
    return {
        "tokens": {"table": own["model.embed_tokens.weight"]},
        "modality": {"table": np.zeros((4, width), np.float32)},
        "decoder": {
            **{f"dense_{i}": dense(layer) for i, layer in enumerate(layers[:first])},
            "moe_layers": jax.tree.map(lambda *stacked: np.stack(stacked), *map(moe, layers[first:])),
        },
        "final_norm": norm("model.norm"),
        "head": {"kernel": kernel("lm_head")},
    }


@pytest.fixture(scope="module")
def batch():
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.pad_id, (len(LENGTHS), max(LENGTHS)))
    valid_BT = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
    tokens_BT = np.where(valid_BT, tokens_BT, CONFIG.pad_id).astype(np.int32)
    return dataclasses.replace(text_batch(tokens_BT), tokens_BT=tokens_BT, valid_BT=valid_BT)


def test_the_tree_is_ours(theirs):
    expected = jax.tree.map(lambda p: p.shape, abstract_params(CONFIG))
    assert jax.tree.map(np.shape, in_our_tree(theirs.named_parameters())) == expected


@pytest.mark.parametrize("dispatch", ["blocks", "dense"])
def test_logits_and_gradients(theirs, batch, dispatch):
    params = jax.tree.map(jnp.asarray, in_our_tree(theirs.named_parameters()))
    model = MultimodalModel(
        dataclasses.replace(CONFIG, stack=dataclasses.replace(CONFIG.stack, execution=Execution(dispatch=dispatch)))
    )

    @jax.jit
    def loss(params):
        logits_BTY = model.apply({"params": params}, batch).logits_BTY
        log_probs = jax.nn.log_softmax(logits_BTY)[:, :-1]
        nats_BT = -jnp.take_along_axis(log_probs, batch.tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return (nats_BT * batch.valid_BT[:, 1:]).sum() / batch.valid_BT[:, 1:].sum(), logits_BTY

    (nats, logits_BTY), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    tokens = torch.tensor(batch.tokens_BT, dtype=torch.int64)
    valid = torch.tensor(batch.valid_BT)
    theirs.zero_grad(set_to_none=True)
    output = theirs(tokens, attention_mask=valid.long(), labels=tokens.masked_fill(~valid, -100))
    output.loss.backward()

    own = batch.valid_BT
    np.testing.assert_allclose(logits_BTY[own], output.logits.detach().numpy()[own], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(nats, output.loss.item(), rtol=1e-5)
    expected = in_our_tree((name, weight.grad) for name, weight in theirs.named_parameters())
    del expected["modality"], gradients["modality"]  # their model has none
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients, expected)


def test_greedy_answers(theirs, batch):
    params = jax.tree.map(jnp.asarray, in_our_tree(theirs.named_parameters()))
    ours_BJ = generate(CONFIG, params, batch, max_new_tokens=12)
    for own_J, tokens_T, length in zip(ours_BJ, batch.tokens_BT, LENGTHS, strict=True):
        prompt = torch.tensor(tokens_T[None, :length], dtype=torch.int64)
        answer = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        their_J = answer[0, length:].numpy()
        np.testing.assert_array_equal(own_J[: len(their_J)], their_J)
        assert (own_J[len(their_J) :] == CONFIG.pad_id).all()
