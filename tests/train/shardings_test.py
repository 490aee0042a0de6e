"""The sharding of every array of the state, for each preset on several meshes, compared with committed dumps."""

import os
import pathlib

import jax
import pytest
from jax.sharding import AxisType

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import logical_axes
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.optim import OptimConfig, make_optimizer
from anyexperts_jax.train.state import abstract_state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
REWRITE = "REWRITE_GOLDEN=1 python -m pytest tests/train/shardings_test.py"
PRESETS = ("tiny", "small", "ling_mini_2")
MESHES = {  # 1x8, 8x1, 2x4, 4x2, 2x2x2 over the axes that hold something
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "expert 8": MeshConfig(data=1, expert=8),
    "data 2 fsdp 4": MeshConfig(data=2, fsdp=4),
    "expert 4 tensor 2": MeshConfig(data=1, expert=4, tensor=2),
    "data 2 expert 2 sequence 2": MeshConfig(data=2, expert=2, sequence=2),
    "fsdp 2 expert 2 tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def lengths(shape):
    return "x".join(map(str, shape)) or "scalar"


def leaf_line(arrays):
    """Shape, dtype and mesh axes of one array, and the shape one device holds of it on each mesh that splits it."""
    first = arrays["data 8"]
    axes = ["+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in first.sharding.spec]
    held = {name: array.sharding.shard_shape(array.shape) for name, array in arrays.items()}
    split = [f"{name}: {lengths(shape)}" for name, shape in held.items() if shape != first.shape]
    return f"{lengths(first.shape)} {first.dtype} ({', '.join(axes)})" + "".join(f" | {part}" for part in split)


def dump(preset):
    """A line for every array of the state; a moment sharded like its parameter shares the parameter's line."""
    model = model_preset(preset)
    optimizer = make_optimizer(OptimConfig(), logical_axes(model))
    states = {name: abstract_state(model, optimizer, make_mesh(mesh)) for name, mesh in MESHES.items()}
    trees = {name: jax.tree_util.tree_leaves_with_path(state) for name, state in states.items()}
    lines = {}
    for leaves in zip(*trees.values(), strict=True):
        path = jax.tree_util.keystr(leaves[0][0], simple=True, separator="/")
        lines[path] = leaf_line({name: leaf for name, (_, leaf) in zip(trees, leaves, strict=True)})
    for path in [path for path in lines if path.startswith("params/")]:
        moments = [path.replace("params", f"opt_state/1/{name}", 1) for name in ("mu", "nu")]
        if all(lines[moment] == lines[path] for moment in moments):
            lines[path] += " | and its mu, nu"
            for moment in moments:
                del lines[moment]
    return "".join(f"{path}: {line}\n" for path, line in lines.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_shardings_equal_the_committed_ones(preset):
    path = GOLDEN / f"shardings_{preset}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(dump(preset))
    assert dump(preset).splitlines() == path.read_text().splitlines(), f"if it is meant: {REWRITE}"


def test_explicit_axes_are_refused_in_one_line():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    explicit = jax.make_mesh(tuple(mesh.shape.values()), mesh.axis_names, axis_types=(AxisType.Explicit,) * 5)
    message = r"^mesh axes data, fsdp, expert, tensor, sequence are not automatic; make the mesh with AxisType\.Auto"
    model = model_preset("tiny")
    with pytest.raises(UserError, match=message):
        abstract_state(model, make_optimizer(OptimConfig(), logical_axes(model)), explicit)
    with pytest.raises(UserError, match=message):
        Placement(explicit)
