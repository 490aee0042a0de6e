"""Dataclasses as pytrees."""

import dataclasses
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_dataclass(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree; fields with `metadata={"static": True}` belong to the tree's structure.

    Unlike with `jax.tree_util.register_dataclass`, unflattening does not run `__init__`: JAX and users put other things
    into a tree (shapes, shardings, axis numbers, None) that would fail the checks of the fields' annotations.
    """
    data = tuple(f.name for f in dataclasses.fields(cls) if not f.metadata.get("static"))  # type: ignore[arg-type]
    static = tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("static"))  # type: ignore[arg-type]
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten_with_keys(node: Any) -> tuple[list, tuple]:
        return [(key, getattr(node, key.name)) for key in keys], tuple(getattr(node, name) for name in static)

    def flatten(node: Any) -> tuple[list, tuple]:
        return [getattr(node, name) for name in data], tuple(getattr(node, name) for name in static)

    def unflatten(aux: tuple, leaves: Any) -> Any:
        node = object.__new__(cls)
        for names, values in ((data, leaves), (static, aux)):
            for name, value in zip(names, values, strict=True):
                object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
