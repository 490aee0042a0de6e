"""The final model of a run of EvoMoE's stages, and diagnostics of its experts and routers."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.evaluate.evaluate import load_batches
from anyexperts_jax.evaluate.router_diagnostics import RouterDiagnostics, diagnose
from anyexperts_jax.evaluate.trained import Trained, load_trained
from anyexperts_jax.evolution.config import EvolveRun, upcycled_model
from anyexperts_jax.evolution.single_expert import single_expert_model, single_expert_params
from anyexperts_jax.evolution.upcycle import upcycle_params
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.paths import leaves_of
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_log import read_records
from experiments.reproduce.run_result import ExpertFigures

_LARGEST_BATCH = 64


def last_model(run: EvolveRun, folder: pathlib.Path) -> Trained:
    """Returns the last stage's model: the dense one (I), expert 1 alone (II), or the mixture (III).

    The first two are returned as a mixture of one expert, which computes the same.
    """
    last = run.stages[-1]
    dense = last == "warm_up" and not run.evolve.evolve_in_warm_up
    trained = _dense_as_mixture(run, folder) if dense else load_trained(folder / last, "last")
    if last == "routing":
        return trained
    model = trained.config.model
    return _with_model(trained, single_expert_model(model), single_expert_params(model, trained.params, 0))


def validation_record(stage_folder: pathlib.Path) -> dict[str, Any]:
    """Returns the last validation record of a finished stage."""
    records = read_records(RunDir(stage_folder).metrics)
    return next(record for record in reversed(records) if record["kind"] == "validation")


def expert_figures(run: EvolveRun, folder: pathlib.Path, trained: Trained, examples: int) -> ExpertFigures:
    """Returns diagnostics, on validation examples, of the final mixture `trained` of the stages in `folder`."""
    rows = min(examples, _LARGEST_BATCH)
    batches = load_batches(trained, trained.config.data.domains, "validation", examples, rows)
    found = diagnose(trained, batches)
    early = run.evolve.evolve_in_warm_up  # then there is no dense model to measure drift from
    dense = None if early else _dense_as_mixture(run, folder)
    distance, drift = {}, {}
    for name in [name for name in run.stages if name != "warm_up" or early]:
        experts = validation_record(folder / name)["experts"]
        distance[name] = tuple(experts[key]["distance"] for key in experts if key != "expert_1")
        if dense is not None:
            here = trained if name == run.stages[-1] else load_trained(folder / name, "last")
            drift[name] = _drift(dense, here)
    return ExpertFigures(
        loss=found.loss,
        shuffled_loss=found.loss + found.shuffle_cost,
        alone=tuple(one["loss"] for one in experts.values()),
        distance=distance,
        drift=drift,
        overlap=_overlaps(found),
        share=_shares(found),
    )


def _dense_as_mixture(run: EvolveRun, folder: pathlib.Path) -> Trained:
    """Returns stage I's model as a mixture of one expert, its unchanged FFN, in each layer that gets experts."""
    dense = load_trained(folder / "warm_up", "last")
    upcycle = dataclasses.replace(run.evolve.upcycle, num_experts=1, init="copy")
    model = upcycled_model(dense.config.model, upcycle, AnyExpertsConfig.static_top_k(1, 1))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return _with_model(dense, model, upcycle_params(dense.params, model, upcycle, jax.random.key(0), mesh))


def _with_model(trained: Trained, model: ModelConfig, params: Any) -> Trained:
    config = dataclasses.replace(trained.config, model=model)
    return dataclasses.replace(trained, config=config, params=params, router_bias_LC=jnp.zeros(model.router_bias_shape))


def _drift(dense: Trained, trained: Trained) -> float:
    """Returns the distance of expert 1 from the dense FFN, divided by its own norm."""

    def first(of: Trained) -> np.ndarray:
        flags, leaves = jax.tree.leaves(leaves_of(of.config.model, "expert")), jax.tree.leaves(of.params)
        kept = [leaf[:, 0] for flag, leaf in zip(flags, leaves, strict=True) if flag]
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in kept])

    own = first(trained)
    return float(np.linalg.norm(own - first(dense)) / np.linalg.norm(own))


def _overlaps(found: RouterDiagnostics) -> dict[str, float]:
    pairs = itertools.combinations(range(len(MODALITY_NAMES)), 2)
    named = {f"{MODALITY_NAMES[a]}-{MODALITY_NAMES[b]}": float(found.overlap_MM[a, b]) for a, b in pairs}
    return {name: value for name, value in named.items() if not np.isnan(value)}


def _shares(found: RouterDiagnostics) -> dict[str, tuple[float, ...]]:
    share_ME = found.share_LME.mean(0)
    return {
        name: tuple(float(one) for one in share_ME[m])
        for m, name in enumerate(MODALITY_NAMES)
        if not np.isnan(share_ME[m]).any()
    }
