import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.tree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    first: Float[Array, "N"]
    second: dict[str, Array]
    label: str = dataclasses.field(default="a", metadata={"static": True})


def test_leaves_of_any_type_pass_and_static_fields_stay_in_the_structure():
    pair = Pair(first=jnp.ones(3), second={"x": jnp.zeros((2, 2))}, label="b")
    shapes = jax.eval_shape(lambda p: p, pair)
    assert shapes.first.shape == (3,)
    assert shapes.label == "b"
    assert jax.tree.map(lambda x: x.ndim, pair).second == {"x": 2}
    assert jax.tree.structure(pair) != jax.tree.structure(dataclasses.replace(pair, label="c"))


def test_paths_name_the_fields():
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(Pair(jnp.ones(1), {"x": jnp.ones(1)}))
    ]
    assert paths == [".first", ".second['x']"]


def test_passes_through_jit_and_grad():
    grad = jax.jit(jax.grad(lambda p: (p.first**2).sum() + p.second["x"].sum()))(
        Pair(jnp.arange(2.0), {"x": jnp.ones(1)})
    )
    assert isinstance(grad, Pair)
    assert grad.first.tolist() == [0.0, 2.0]
