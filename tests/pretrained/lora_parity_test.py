"""A saved adapter, loaded by peft on transformers' model, gives our logits."""

import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.pretrained.lora import with_adapter
from pretrained.lora_test import random_adapter
from pretrained.tiny_hub import tiny_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# peft 0.21 uses a name that transformers 5.24 has changed.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]

PATTERNS = ("**/attention/*/kernel", "**/mlp/**")


@pytest.mark.parametrize(("case", "patterns"), [("llama", PATTERNS), ("qwen3_moe", PATTERNS[:1])])
def test_peft_computes_the_same_logits(tmp_path, case, patterns):
    folder = tiny_checkpoint(tmp_path / "hub", case)
    base = load_pretrained(folder)
    m = with_adapter(base, random_adapter(base, LoraConfig(rank=3, alpha=5.0, patterns=patterns)))
    m.export(tmp_path / "adapter", form="adapter")
    tokens_BT = np.random.default_rng(1).integers(0, 53, (2, 9))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(m.logits(tokens_BT), wanted, atol=1e-4)
    assert np.abs(np.asarray(base.logits(tokens_BT)) - wanted).max() > 0.01
