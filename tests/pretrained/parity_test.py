"""Every family against transformers, from tiny random checkpoints: logits, chosen experts, greedy answers, export."""

import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from pretrained.tiny_hub import CASES, tiny_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

LENGTHS = (23, 11, 1)


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
    """(logits, what each router chose, layer by layer)."""
    chosen = []

    def keep(module, inputs, outputs):
        chosen.append(outputs[2].reshape(*tokens_BT.shape, -1).numpy())

    hooks = [m.register_forward_hook(keep) for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    with torch.no_grad():
        logits = model(torch.tensor(tokens_BT), attention_mask=torch.tensor(valid_BT).long()).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), chosen


@pytest.mark.parametrize("case", CASES)
def test_logits_and_chosen_experts(tmp_path, case):
    folder = tiny_checkpoint(tmp_path / "hub", case, seed=len(case))
    model = load_pretrained(folder)
    tokens_BT, valid_BT = right_padded(53)
    expected_BTY, chosen = run(theirs(folder), tokens_BT, valid_BT)
    output = model.forward(tokens_BT, valid_BT)
    np.testing.assert_allclose(
        np.asarray(output.logits_BTY)[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4, err_msg=case
    )
    assert len(chosen) == model.config.stack.num_moe_layers
    for ours_BTK, their_BTK in zip(np.asarray(output.trace.expert_ids_BTK), chosen, strict=True):
        np.testing.assert_array_equal(np.sort(ours_BTK[valid_BT]), np.sort(their_BTK[valid_BT]))
