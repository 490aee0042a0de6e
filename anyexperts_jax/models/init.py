"""Parameters of a model as plain nested dicts: their values, shapes, logical axes and number."""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anyexperts_jax.core.batch import Batch, make_batch
from anyexperts_jax.core.initializers import Normal
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.audio_tower import Sounds
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.models.vision_tower import Frames
from anyexperts_jax.nn.params import NamedAxes

# Parameters with at most this many elements per layer share a few draws: XLA compiles a generator for every draw.
_DRAW_SIZES = (2**8, 2**12, 2**16, 2**20)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Initial parameters. Each is drawn from the key and its own name, so that a change to one part of the
    configuration leaves the values of the other parts alone.

    The model itself is not run.
    """
    boxed = _boxed_shapes(config)
    values = init_leaves(config, key, tuple(named_leaves(boxed)))
    return jax.tree.unflatten(jax.tree.structure(boxed, is_leaf=_is_box), list(values.values()))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The tree's leaves by name, such as "decoder/dense_0/norm/scale", in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def params_of_leaves(config: ModelConfig, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `named_leaves` for the parameters of a model; leaves of other names are left out."""
    shapes = abstract_params(config)
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in named_leaves(shapes)])


def init_leaves(config: ModelConfig, key: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """The initial values of the named parameters only. They equal those of `init_params` up to rounding."""
    every = named_leaves(_boxed_shapes(config))
    boxes = {name: every[name] for name in names}
    normals = _standard_normals(key, {name: box for name, box in boxes.items() if _is_random(box)})
    values = {}
    for name, box in boxes.items():
        shape, dtype = box.value.shape, box.value.dtype
        if _is_random(box):
            std = box.init.std(shape[1:] if _is_stacked(box) else shape)
            values[name] = (std * normals[name].reshape(shape)).astype(dtype)
        else:
            values[name] = box.init(key, shape, dtype)
    return values


def _standard_normals(key: Array, boxes: dict[str, NamedAxes]) -> dict[str, Array]:
    """Standard normal draws, flattened to [layers, elements]. A layer's draws depend on the key, the parameter's name
    and the layer's index."""
    groups: dict[int, list[str]] = {}
    for name, box in boxes.items():
        layers, elements = _layers_and_elements(box)
        size = next((s for s in _DRAW_SIZES if elements <= s), elements)
        groups.setdefault(size, []).append(name)
    draws = {}
    for size, names in groups.items():
        rows = [(zlib.crc32(n.encode()), layer) for n in names for layer in range(_layers_and_elements(boxes[n])[0])]
        name_R, layer_R = (jnp.asarray(column, jnp.uint32) for column in zip(*rows, strict=True))
        keys_R = jax.vmap(lambda n, layer: jax.random.fold_in(jax.random.fold_in(key, n), layer))(name_R, layer_R)
        drawn = jax.vmap(lambda key, size=size: jax.random.normal(key, (size,)))(keys_R)
        first = 0
        for name in names:
            layers, elements = _layers_and_elements(boxes[name])
            draws[name] = drawn[first : first + layers, :elements]
            first += layers
    return draws


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """The tree of `init_params` as ShapeDtypeStructs; computes nothing."""
    return _unbox(_boxed_shapes(config))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The tree of `init_params` with each parameter's logical axis names (see core.axes) in its place."""
    return jax.tree.map(lambda box: box.names, _boxed_shapes(config), is_leaf=_is_box)


def parameter_count(config: ModelConfig) -> int:
    """The number of scalars in the parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(config)))


def active_parameter_count(config: ModelConfig, real_slots: float | None = None) -> int:
    """Parameters a token uses when it goes to `real_slots` experts a layer (default: the nominal budget).

    All embeddings and the head count, as in published figures of "activated" parameters.
    """
    share = (config.moe.expected_real_slots if real_slots is None else real_slots) / config.moe.num_experts
    boxes = jax.tree.leaves(_boxed_shapes(config), is_leaf=_is_box)
    return round(sum(math.prod(b.value.shape) * (share if "expert" in b.names else 1) for b in boxes))


def smallest_batch(config: ModelConfig) -> Batch:
    """One sequence of one text token, with room for one patch and one audio frame: enough to create every parameter."""
    one_BT = jnp.ones((1, 1), jnp.int32)
    patch_features = config.vision.patch_features if config.vision else 0
    frame_features = config.audio.frame_features if config.audio else 0
    rows_P, rows_S = int(config.vision is not None), int(config.audio is not None)
    return make_batch(
        one_BT * config.pad_id,
        patches_BPX=jnp.zeros((1, rows_P, patch_features)),
        frames_BSX=jnp.zeros((1, rows_S, frame_features)),
    )


def smallest_media(config: ModelConfig) -> PlacedMedia | None:
    """One merged square and one chunk of sound for the towers, which no position of `smallest_batch` reads; None
    without towers."""
    sees, hears = config.vision_tower, config.audio_tower
    if sees is None and hears is None:
        return None
    frames = sounds = None
    if sees is not None:
        frames = Frames(jnp.zeros((1, sees.merge**2, sees.patch_features)), jnp.full((1, 2), sees.merge, jnp.int32))
    if hears is not None:
        one_IO = jnp.ones((1, 1), jnp.int32)
        sounds = Sounds(jnp.zeros((1, 1, hears.chunk_frames, hears.mel_bins)), frames_IO=one_IO, width_IO=one_IO)
    one_BT = jnp.zeros((1, 1), jnp.int32)
    return PlacedMedia(frames, sounds, row_BT=one_BT - 1, modality_BT=one_BT, rotary_BT3=jnp.zeros((1, 1, 3)))


@functools.lru_cache(maxsize=32)
def _boxed_shapes(config: ModelConfig) -> dict[str, Any]:
    # Parameters do not depend on the execution. The configured one may need a mesh or another device: use the default.
    config = config.with_execution(Execution())

    def init(key: Array) -> Any:
        return MultimodalModel(config).init(key, smallest_batch(config), placed=smallest_media(config))["params"]

    shapes: dict[str, Any] = jax.eval_shape(init, jax.random.key(0))
    return shapes


def _is_box(node: Any) -> bool:
    return isinstance(node, NamedAxes)


def _is_random(box: NamedAxes) -> bool:
    return isinstance(box.init, Normal) and box.init.scale != 0


def _is_stacked(box: NamedAxes) -> bool:
    return box.names[:1] == ("layers",)


def _layers_and_elements(box: NamedAxes) -> tuple[int, int]:
    """(layers stacked, elements of one layer)."""
    layers = box.value.shape[0] if _is_stacked(box) else 1
    return layers, math.prod(box.value.shape) // layers


def _unbox(boxed: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)
