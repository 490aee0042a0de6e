"""Expert compute, and attention: one folder an op, with the same file names in each.

api        checks, choice of implementation; the only module callers import
reference  the op in plain `jax.numpy`, short enough to be read against its definition
xla        forward and backward as XLA runs them well
vjp        ties the two together as a `core.derivatives.Differentiable`
pallas_*   kernels for one kind of device, which know nothing of derivatives; `vjp_tpu`, `vjp_gpu` tie them together

`routed_mlp/tpu` and `routed_mlp/gpu` run the kernels of `expert_mlp` over the block-aligned buffer.

Beside them `slot_order`, `aligned_rows` and `row_map`: where slots and rows lie, and the gathers between.
"""
