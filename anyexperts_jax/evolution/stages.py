"""EvoMoE's three stages. Each is a run in a subdirectory and starts from the end of the one before.

I warm-up: the dense model trains. II evolution: expert 1 trains and the others follow. III routing: the routers train.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.evolution.config import CONFIG_NAME, STAGES, EvolveRun, load_evolve_config
from anyexperts_jax.evolution.diversity import diversity_apply
from anyexperts_jax.evolution.evolve import expert_evolution
from anyexperts_jax.evolution.published import keep_mixture
from anyexperts_jax.evolution.single_expert import expert_measure, single_expert_apply
from anyexperts_jax.evolution.upcycle import rerouted_params, upcycle_params
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import init_params, logical_axes
from anyexperts_jax.models.paths import leaves_of
from anyexperts_jax.train.config import describe_differences
from anyexperts_jax.train.frozen import combine_optimizers, train_only
from anyexperts_jax.train.loop import TrainResult, train
from anyexperts_jax.train.optim import make_optimizer
from anyexperts_jax.train.recipe import EVERYTHING, Recipe
from anyexperts_jax.train.run_dir import RunDir, load_run, write_whole
from anyexperts_jax.train.run_lock import run_lock
from anyexperts_jax.train.run_tokenizer import pin_tokenizer, require_same_tokens
from anyexperts_jax.train.same_run import FREE_KEYS, differing_models, is_among
from anyexperts_jax.train.strict import differing_keys


def evolve(
    run: EvolveRun,
    root: str | pathlib.Path,
    stages: tuple[str, ...] = STAGES,
    *,
    progress: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, TrainResult]:
    """Runs the stages in order, each in ROOT/STAGE. Finished stages are skipped, interrupted ones are resumed.

    Returns the result of each stage that has steps. `note` is called with a line when a stage starts.

    Raises:
      UserError: if ROOT holds a run of another configuration, or the predecessor of a stage is not finished.
      RunStoppedError: as for `train.loop.train`.
    """
    root = RunDir(pathlib.Path(root)).root
    for name in stages:
        require_one_of("stage", name, STAGES)
    run = _with_tokenizer(run, root)
    chosen = [name for name in run.stages if name in stages]
    results = {}
    with run_lock(root, "train", "evolve"):
        _require_same_run(run, root)
        for name in chosen:
            if not RunDir(root / name).checkpoint_steps() and _predecessor(run, name) not in chosen:
                _check_predecessor(run, root, name)
        for name in chosen:
            if name != "warm_up":
                keep_mixture(run, root / name, note)
            note(f"stage {name}: {getattr(run.evolve, name).steps} steps in {root / name}")
            recipe = dataclasses.replace(stage_recipe(run, root, name), begin=functools.partial(_write, run, root))
            results[name] = train(run.stage(name), root / name, progress=progress, recipe=recipe)
    return results


def stage_recipe(run: EvolveRun, root: pathlib.Path, name: str) -> Recipe:
    """How a stage differs from plain training: its start, what is trained, the update rule and what is measured."""
    model, config = run.model, run.stage(name)
    if name == "warm_up" and not run.evolve.evolve_in_warm_up:
        return EVERYTHING
    experts, routers = leaves_of(model, "expert"), leaves_of(model, "router")
    start = _starting_parameters(run, root, name)
    axes = logical_axes(model)

    def adamw(trained: Any) -> Any:
        return train_only(make_optimizer(config.optim, _selected_axes(axes, trained)), trained)

    if name != "routing":
        evolution = expert_evolution(
            make_optimizer(config.optim, _selected_axes(axes, experts)),
            run.evolve.evolution,
            num_experts=model.moe.num_experts,
            steps=config.train.steps,
            key=jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1)),
        )
        trained, optimizer = experts, train_only(evolution, experts)
        if name == "warm_up":
            others = jax.tree.map(lambda expert, router: not (expert or router), experts, routers)
            trained = jax.tree.map(lambda router: not router, routers)
            optimizer = combine_optimizers(optimizer, experts, adamw(others), others)
        return Recipe(start, trained, optimizer, single_expert_apply, expert_measure(model))
    apply = None
    if run.evolve.diversity != "none":
        apply = functools.partial(diversity_apply, run.evolve.diversity, run.evolve.diversity_weight)
    if run.evolve.trains == "all":
        return Recipe(start, apply=apply, measure=expert_measure(model))
    trained = routers
    if run.evolve.trains == "moe":
        trained = jax.tree.map(lambda expert, router: expert or router, experts, routers)
    return Recipe(start, trained, adamw(trained), apply, expert_measure(model))


def _selected_axes(axes: Any, trained: Any) -> Any:
    """The logical axes of trained parameters, None for others: the mask of weight decay must match what is trained."""
    return jax.tree.map(lambda kept, names: names if kept else None, trained, axes)


def _starting_parameters(run: EvolveRun, root: pathlib.Path, name: str) -> Callable[[Mesh], Any]:
    key, upcycle, early = jax.random.key(run.base.seed), run.evolve.upcycle, run.evolve.evolve_in_warm_up

    def start(mesh: Mesh) -> Any:
        if name == "warm_up":  # the experts evolve from the first step on
            dense = init_params(run.base.model, key)
            return upcycle_params(dense, run.model, upcycle, key, mesh, consume=True)
        predecessor = _predecessor(run, name)
        config, params, _ = load_run(root / predecessor, "last", mesh)
        require_same_tokens(run.base.data, config.data, f"stage {predecessor}")
        wanted = run.stage(predecessor).model
        # Only expert 1 was used in these stages, so their routing policy is irrelevant.
        if predecessor == "evolving" or early:
            same_number = config.model.moe.num_experts == wanted.moe.num_experts
            found = dataclasses.replace(config.model, moe=wanted.moe) if same_number else config.model
            _check_model(found, wanted, root / predecessor)
            same = not differing_models(config.model, wanted)
            return params if same else rerouted_params(params, run.model, key, mesh)
        _check_model(config.model, wanted, root / predecessor)
        return upcycle_params(params, run.model, upcycle, key, mesh, consume=True)

    return start


def stage_done(run: EvolveRun, root: pathlib.Path, name: str) -> bool:
    """Whether ROOT/STAGE has the checkpoint of the stage's last step."""
    steps = RunDir(root / name).checkpoint_steps()
    return bool(steps) and steps[-1] == getattr(run.evolve, name).steps


def _predecessor(run: EvolveRun, name: str) -> str:
    return "evolving" if name == "routing" and run.evolve.evolving.steps else "warm_up"


def _check_predecessor(run: EvolveRun, root: pathlib.Path, name: str) -> None:
    if name == "warm_up":
        return
    before = _predecessor(run, name)
    steps, wanted = RunDir(root / before).checkpoint_steps(), getattr(run.evolve, before).steps
    reached = f"it stopped at step {steps[-1]}" if steps else "it has no checkpoint"
    require(
        stage_done(run, root, before),
        f"stage {name} starts from the end of stage {before}, step {wanted} in {root / before}, but {reached}; "
        "run that stage first",
    )


def _check_model(found: ModelConfig, wanted: ModelConfig, where: pathlib.Path) -> None:
    differences = differing_models(wanted, found)
    require(not differences, f"the model in {where} is a different one: {describe_differences(differences)}")


def _with_tokenizer(run: EvolveRun, root: pathlib.Path) -> EvolveRun:
    """The run with its tokenizer's fingerprint filled in; all stages share the tokenizer."""
    first = RunDir(root / run.stages[0])
    data = pin_tokenizer(run.base.data, run.base.model, first.tokenizer, begun=bool(first.checkpoint_steps()))
    return dataclasses.replace(run, base=dataclasses.replace(run.base, data=data))


def _require_same_run(run: EvolveRun, root: pathlib.Path) -> None:
    """Checks that the stages in the directory were started with this configuration.

    Raises:
      UserError: naming the keys that differ, with both values.
    """
    path = root / CONFIG_NAME
    begun = [name for name in STAGES if RunDir(root / name).checkpoint_steps()]
    if path.exists() and begun:
        free = [f"base.{key}" for key in FREE_KEYS]
        free += [f"evolve.{name}." for name in STAGES if name not in begun]
        if begun == ["warm_up"]:
            free += ["evolve.upcycle.", "evolve.evolution.", "evolve.moe."]
        if "routing" not in begun:
            free.append("evolve.trains")
        differences = differing_keys(run, load_evolve_config(path))
        fixed = {key: values for key, values in differences.items() if not is_among(key, tuple(free))}
        require(
            not fixed,
            f"the run in {root} has begun {', '.join(begun)} with another configuration: "
            f"{describe_differences(fixed)}; take another --run",
        )


def _write(run: EvolveRun, root: pathlib.Path) -> None:
    write_whole(root / CONFIG_NAME, json.dumps(dataclasses.asdict(run), indent=2) + "\n")
