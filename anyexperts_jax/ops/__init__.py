"""Expert compute and attention: one folder per op, with the same file names in each.

api        checks the arguments and chooses an implementation; the only module that callers import
reference  the op in plain `jax.numpy`, short enough to compare with its definition
xla        forward and backward in a form that XLA compiles to fast code
vjp        joins forward and backward as a `core.derivatives.Differentiable`
pallas_*   kernels for one kind of device; they know nothing of derivatives, `vjp_tpu` and `vjp_gpu` add these

`routed_mlp/tpu` and `routed_mlp/gpu` run the kernels of `expert_mlp` over the block-aligned buffer.

`slot_order`, `aligned_rows` and `row_map` say where slots and rows lie, and gather between the two.
"""
