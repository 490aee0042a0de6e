"""The checkpoints that trainings start from: the model split into experts, with or without attached slots."""

import pathlib
from collections.abc import Callable

from anyexperts_jax.pretrained.attach import attach
from anyexperts_jax.pretrained.load import load_pretrained
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.split import split
from experiments.dial.plan import KINDS, Kind, Plan, digest

Note = Callable[[str], None]


def start_of(plan: Plan, kind: Kind, seed: int, note: Note) -> pathlib.Path:
    """Returns the folder of a training's start, which is made once. A split by activations is the same for all seeds.

    Raises:
      UserError: if the model cannot be read, split or given slots.
    """
    drawn = seed if kind.slots or kind.method == "random" else 0
    shape = {name: getattr(plan, name) for name in ("experts", "shared", "virtual", "width")}
    name = digest(
        model=plan.sources["model"], train=plan.sources["train"], seed=drawn, kind=_start_parts(kind), **shape
    )
    folder = plan.run / "starts" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _made(plan, kind, drawn, note).export(folder, "anyexperts")
    return folder


def _start_parts(kind: Kind) -> tuple[str, bool]:
    return kind.method, kind.slots


def _made(plan: Plan, kind: Kind, seed: int, note: Note) -> Pretrained:
    if kind.slots:
        cut = load_pretrained(start_of(plan, KINDS["static"], seed, note))
        note(f"attaching slots to the split model, seed {seed}")
        return attach(cut, k_min=plan.k_min, k_max=plan.k_max, num_virtual=plan.virtual, seed=seed)
    note(f"splitting {plan.model} into {plan.experts} experts by {kind.method}")
    return split(
        load_pretrained(plan.model),
        num_experts=plan.experts,
        num_shared=plan.shared,
        text=plan.train_text,
        method=kind.method,
        seed=seed,
    )
