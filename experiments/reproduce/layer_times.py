"""Times one MoE layer by its realised real experts, dynamic and static, for Figure 3's third axis."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.bench.stopwatch import interleaved_rounds
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.shapes import SHAPES
from anyexperts_jax.core.versions import device_text, versions
from anyexperts_jax.evaluate.results import read_saved
from anyexperts_jax.nn.moe import MoE
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.train.run_dir import write_whole

NAME = "layer_times.json"
SHAPE = "S1"  # a shape of `anyexperts bench layer`; at the size of the runs, experts take a small part of the time
DYNAMIC_BUDGETS = (4.8, 6.4, 7.2, 8.0, 9.6)
STATIC_K = (4, 6, 8, 10)
ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of a forward pass with router, importance and virtual experts, by realised real experts."""

    shape: str
    tokens: int
    device: str
    versions: dict[str, str]
    others_load: float | None  # cores that other processes kept busy meanwhile
    dynamic: tuple[tuple[float, float], ...]  # (realised, milliseconds)
    static: tuple[tuple[float, float], ...]

    @property
    def reference(self) -> float:
        """Returns the milliseconds of static top-8, the unit of times in figures."""
        return dict(self.static)[8.0]


def measure_layer_times(rounds: int = ROUNDS) -> LayerTimes:
    """Times all budgets in turn on random tokens, so that load affects all equally. Takes about a minute."""
    shape = SHAPES[SHAPE]
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((1, shape.tokens, shape.width)), jnp.float32)
    E = shape.experts
    base = AnyExpertsConfig(num_experts=E, num_virtual=E // 4)
    cases: dict[tuple[str, float], AnyExpertsConfig] = {}
    cases |= {("dynamic", budget): shift_budget(base, budget) for budget in DYNAMIC_BUDGETS}
    cases |= {("static", float(k)): AnyExpertsConfig.static_top_k(E, k) for k in STATIC_K}
    calls, realised = {}, {}
    for key, config in cases.items():
        layer = MoE(config, shape.hidden)
        params = jax.jit(layer.init)(jax.random.key(0), x_BTD)
        apply = jax.jit(layer.apply)
        trace: Any = apply(params, x_BTD)[1]
        realised[key] = float(trace.real_slots_BT.mean())
        calls[str(key)] = functools.partial(apply, params, x_BTD)
    timed = interleaved_rounds(calls, rounds)
    points = {
        kind: tuple((realised[key], timed.milliseconds(str(key))) for key in cases if key[0] == kind)
        for kind in ("dynamic", "static")
    }
    return LayerTimes(SHAPE, shape.tokens, device_text(), versions(), timed.others_load, **points)


def save_layer_times(times: LayerTimes, folder: pathlib.Path) -> pathlib.Path:
    path = folder / NAME
    write_whole(path, json.dumps(dataclasses.asdict(times), indent=1) + "\n")
    return path


def load_layer_times(folder: pathlib.Path) -> LayerTimes | None:
    """Loads the layer times; None without such a file.

    Raises:
      UserError: if this version did not write the file.
    """
    path = folder / NAME
    if not path.exists():
        return None
    return read_saved(
        LayerTimes, path.read_text(), f"{path} is not a file of layer times", "remove it to measure again"
    )
