"""The mixture-of-experts layer and train step of transformers, for comparison with ours (extra `parity`)."""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

if TYPE_CHECKING:
    from anyexperts_jax.bench.step import StepSize

IMPLEMENTATION = "grouped_mm"  # dropless, and its fastest on a CPU except for a few shapes
PEER = f"transformers {IMPLEMENTATION}"


def has_transformers() -> bool:
    """Whether transformers can run on the device that JAX uses."""
    if not all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers")):
        return False
    return jax.default_backend() == "cpu" or (jax.default_backend() == "gpu" and _has_cuda())


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


class _Result:
    """Wraps a tensor so that `jax.block_until_ready` waits for it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def block_until_ready(self) -> Any:
        import torch

        if self.tensor.is_cuda:
            torch.cuda.synchronize()
        return self.tensor


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _tensor(array: Array) -> Any:
    """Copies the array to a tensor on the same device."""
    import torch

    return torch.from_dlpack(array).clone()


def transformers_layer(
    x_ND: Array,
    expert_ids_NK: Array,
    weights_NK: Array,
    weights: tuple[Array, Array, Array],
    *,
    backward: bool,
) -> Callable[[], Any]:
    """A call that runs Qwen3MoeExperts once, in the operands' dtype and on their device.

    With `backward` it also computes the gradients of x, the combine weights and the experts.

    Args:
      weights: w_gate_EDF, w_up_EDF, w_down_EFD.
    """
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    experts, width, hidden = w_gate_EDF.shape
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=expert_ids_NK.shape[1],
    )
    config._experts_implementation = IMPLEMENTATION
    x = _tensor(x_ND)
    with torch.device(x.device):
        layer = Qwen3MoeExperts(config).to(x.dtype)
    with torch.no_grad():
        layer.gate_up_proj.copy_(_tensor(jnp.concatenate([w_gate_EDF, w_up_EDF], axis=2)).mT)
        layer.down_proj.copy_(_tensor(w_down_EFD).mT)
    slot_weights, ids = _tensor(weights_NK).to(x.dtype), _tensor(expert_ids_NK).long()

    def forward() -> Any:
        with torch.no_grad():
            return _Result(layer(x, ids, slot_weights))

    def forward_and_backward() -> Any:
        layer.zero_grad(set_to_none=True)
        operands = x.clone().requires_grad_(), slot_weights.clone().requires_grad_()
        y = layer(operands[0], ids, operands[1])
        y.backward(torch.ones_like(y))
        return _Result(y)

    return forward_and_backward if backward else forward


def transformers_step(size: "StepSize", tokens_BT: np.ndarray) -> tuple[Callable[[], Any], int]:
    """(a call that takes one AdamW step of Qwen3MoeForCausalLM with its balance loss, number of parameters).

    Parameters and moments have the size's dtype, whereas ours are float32. `torch.autocast` is no alternative: it runs
    grouped_mm in float32 with one matmul per expert, which takes three times as long on an H100.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields: dict[str, Any] = {"head_dim": size.width // size.heads, "tie_word_embeddings": False}
    config = Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        moe_intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        num_experts=size.experts,
        num_experts_per_tok=size.slots,
        norm_topk_prob=True,
        output_router_logits=True,
        max_position_embeddings=size.length,
        use_cache=False,
        **fields,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(_device(), getattr(torch, size.dtype)).train()
    model.set_experts_implementation(IMPLEMENTATION)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.tensor(tokens_BT, dtype=torch.int64, device=_device())

    def step() -> Any:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _Result(loss.detach())

    return step, sum(parameter.numel() for parameter in model.parameters())
