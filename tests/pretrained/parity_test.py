"""Every family against transformers, from tiny random checkpoints: logits, chosen experts, greedy answers, export."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import moe_probe
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, decode
from pretrained.tiny_hub import CASES, hub_values, tensors_in, tiny_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

LENGTHS = (23, 11, 1)
GREEDY = (  # one case of every text family
    *("llama tied", "qwen3", "qwen3_moe", "olmoe", "mixtral", "glm4_moe", "sarvam_moe"),
    *("deepseek_v3", "deepseek_v3 full queries"),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def theirs(folder):
    """transformers' model, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def right_padded(vocab_size, seed=0):
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, vocab_size, (len(LENGTHS), max(LENGTHS)))
    return tokens_BT, np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]


def run(model, tokens_BT, valid_BT):
    """Returns (logits, the experts chosen in each layer)."""
    chosen = []

    def keep(module, inputs, outputs):
        chosen.append(outputs[2].reshape(*tokens_BT.shape, -1).numpy())

    hooks = [m.register_forward_hook(keep) for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    with torch.no_grad():
        logits = model(torch.tensor(tokens_BT), attention_mask=torch.tensor(valid_BT).long()).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), chosen


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_chosen_experts(tmp_path, case, seed):
    folder = tiny_checkpoint(tmp_path / "hub", case, seed=len(case) + 100 * seed)
    model = load_pretrained(folder)
    tokens_BT, valid_BT = right_padded(53, seed)
    expected_BTY, chosen = run(theirs(folder), tokens_BT, valid_BT)
    output = model.forward(tokens_BT, valid_BT)
    np.testing.assert_allclose(
        np.asarray(output.logits_BTY)[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4, err_msg=case
    )
    assert len(chosen) == model.config.stack.num_moe_layers
    for ours_BTK, their_BTK in zip(np.asarray(output.trace.expert_ids_BTK), chosen, strict=True):
        np.testing.assert_array_equal(np.sort(ours_BTK[valid_BT]), np.sort(their_BTK[valid_BT]))


MIXTURES = [case for case, (architecture, own) in CASES.items() if "num_experts_per_tok" in own]


@pytest.mark.parametrize("case", MIXTURES)
def test_weights_of_the_chosen_experts(tmp_path, case):
    """Logits can hide a wrong rule of the weights: whether they are renormalised, scaled, or include the bias."""
    folder = tiny_checkpoint(tmp_path / "hub", case, seed=11)
    model, own, tokens_BT = load_pretrained(folder), theirs(folder), right_padded(53)[0]
    routed = []
    hooks = [
        m.register_forward_hook(lambda _, __, outputs: routed.append([part.numpy() for part in outputs[1:3]]))
        for m in own.modules()
        if type(m).__name__.lower().endswith("topkrouter")
    ]
    with torch.no_grad():
        own(torch.tensor(tokens_BT))
    for hook in hooks:
        hook.remove()
    batch = make_batch(jnp.asarray(tokens_BT, jnp.int32))
    output, variables = jax.jit(
        lambda params: MultimodalModel(model.config).apply(
            {"params": params}, batch, router_bias_LC=model.router_bias_LC, mutable=["probe"]
        )
    )(model.params)
    ids_LNK, weights_LNK = (
        np.asarray(part).reshape(len(routed), tokens_BT.size, -1)
        for part in (output.trace.expert_ids_BTK, moe_probe(variables)["weights_BTK"])
    )

    def by_expert(ids_NK, weights_NK):
        found_NE = np.zeros((tokens_BT.size, model.config.moe.num_experts), np.float32)
        np.put_along_axis(found_NE, ids_NK, weights_NK, axis=1)
        return found_NE

    for ids_NK, weights_NK, (their_weights, their_ids) in zip(ids_LNK, weights_LNK, routed, strict=True):
        ours, expected = by_expert(ids_NK, weights_NK), by_expert(their_ids, their_weights)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", GREEDY)
def test_32_greedy_tokens(tmp_path, case):
    folder = tiny_checkpoint(tmp_path / "hub", case, seed=3)
    model, prompts = load_pretrained(folder), ((3, 1, 4, 1, 5, 9, 2, 6, 5), (8,))
    found = decode(model.weights, prompts, Request(32), BudgetInForce(), lambda row, token: True).tokens
    own = theirs(folder)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        ids = own.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert answer == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", ["llama llama3", "sarvam_moe", "deepseek_v3", "deepseek_v3 full queries"])
def test_transformers_reads_our_export(tmp_path, case):
    model = load_pretrained(tiny_checkpoint(tmp_path / "hub", case, stacked=True))
    model.export(tmp_path / "out")
    tokens_BT, valid_BT = right_padded(53)
    expected_BTY, _ = run(theirs(tmp_path / "out"), tokens_BT, valid_BT)
    ours_BTY = np.asarray(model.logits(tokens_BT, valid_BT))
    np.testing.assert_allclose(ours_BTY[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4)


def test_we_read_what_transformers_saves(tmp_path):
    """transformers' config.json has the rope settings under one key only, and another key for the number of experts."""
    values = hub_values("qwen3_moe")
    own = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3MoeConfig(**{k: v for k, v in values.items() if k not in ("architectures", "model_type")})
    ).eval()
    own.save_pretrained(tmp_path / "hub")
    tokens_BT, valid_BT = right_padded(53)
    expected_BTY, _ = run(own, tokens_BT, valid_BT)
    ours_BTY = np.asarray(load_pretrained(tmp_path / "hub").logits(tokens_BT, valid_BT))
    np.testing.assert_allclose(ours_BTY[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4)


def test_padding_on_the_left(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hub", "qwen3_moe raw weights")
    tokens_BT, valid_BT = (array[:, ::-1].copy() for array in right_padded(53))
    own = theirs(folder)
    positions = torch.tensor(np.maximum(valid_BT.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        mask = torch.tensor(valid_BT).long()
        expected_BTY = own(torch.tensor(tokens_BT), attention_mask=mask, position_ids=positions).logits.numpy()
    ours_BTY = np.asarray(load_pretrained(folder).logits(tokens_BT, valid_BT))
    np.testing.assert_allclose(ours_BTY[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_gradients(tmp_path, case):
    folder = tiny_checkpoint(tmp_path / "hub", case)
    model, own = load_pretrained(folder), theirs(folder)
    tokens_BT = right_padded(51)[0]  # torch sets the gradient of the padding embedding to zero
    own(torch.tensor(tokens_BT), labels=torch.tensor(tokens_BT)).loss.backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        batch = make_batch(jnp.asarray(tokens_BT, jnp.int32))
        output = MultimodalModel(model.config).apply({"params": params}, batch, router_bias_LC=model.router_bias_LC)
        log_probs = jax.nn.log_softmax(output.logits_BTY)[:, :-1]
        return -jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1).mean()

    # A model whose weights are the gradients maps them to transformers' names.
    dataclasses.replace(model, params=gradient(model.params)).export(tmp_path / "gradients")
    found = tensors_in(tmp_path / "gradients")
    for name, weight in own.named_parameters():
        if name in found:  # transformers stacks the experts
            np.testing.assert_allclose(found[name], weight.grad, rtol=2e-3, atol=2e-6, err_msg=name)
    if case != "llama":
        stacked = dict(own.named_parameters())["model.layers.1.mlp.experts.down_proj"].grad
        for expert, grad in enumerate(stacked):
            name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
            np.testing.assert_allclose(found[name], grad, rtol=2e-3, atol=2e-6)


def test_a_wrong_theta_changes_the_logits(tmp_path):
    """A theta of 10000 instead of the model's own loads without error and generates other text."""
    folder = tiny_checkpoint(tmp_path / "hub", "llama", rope_theta=100.0)
    tokens_BT, valid_BT = right_padded(53)
    expected_BTY, _ = run(theirs(folder), tokens_BT, valid_BT)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "rope_theta": 10000.0}))
    wrong_BTY = np.asarray(load_pretrained(folder).logits(tokens_BT, valid_BT))
    assert np.abs(wrong_BTY - expected_BTY)[valid_BT].max() > 0.1
