"""The configuration of an EvoMoE run: how experts are initialised, how they evolve, and the three stages."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any, Literal

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.train.config import RunConfig, TrainConfig, run_config
from anyexperts_jax.train.config_files import names_in, read_toml, table_in, with_overrides
from anyexperts_jax.train.moved import move_keys
from anyexperts_jax.train.published_config import is_published
from anyexperts_jax.train.strict import build, merge

ExpertInit = Literal["copy", "noise", "dropout", "random_subset"]
EvolutionMode = Literal["ema", "lag", "literal"]
Trains = Literal["router", "moe", "all"]
Diversity = Literal["none", "contrastive", "local_entropy"]
STAGES = ("warm_up", "evolving", "routing")
CONFIG_NAME = "evolve.json"  # in the directory of an EvoMoE run


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """Upcycling: which layers get experts, how many, and how the experts differ at the start.

    "copy": they do not differ, so the model computes the same as the dense one if combine weights sum to one. The other
    choices are baselines for diversity, in which expert 1 is always the dense FFN itself (our reading). "noise": adds
    normal noise. "dropout": sets single weights to zero and scales up the others. "random_subset": reinitialises a
    random part of the FFN's units with the mean and standard deviation of the weights they replace (as in
    Drop-Upcycling).

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    num_experts: int = 4  # N, including the exact copy of the dense FFN
    moe_every: int = 2  # every moe_every-th layer gets experts: the second of each two (EvoMoE does not say which)
    num_dense_layers: int = 0  # leading layers that stay dense
    init: ExpertInit = "copy"  # how experts 2 to N differ from the dense FFN at the start
    noise: float = 0.1  # standard deviation relative to the root mean square of the weights
    dropped: float = 0.1  # share of weights set to zero
    redrawn: float = 0.5  # share of units that are reinitialised

    def __post_init__(self) -> None:
        check_field_types(self, "upcycle.")
        for name in ("num_experts", "moe_every"):
            require(getattr(self, name) >= 1, f"upcycle.{name}={getattr(self, name)} must be >= 1")
        require(self.num_dense_layers >= 0, f"upcycle.num_dense_layers={self.num_dense_layers} must be >= 0")
        require(self.noise >= 0, f"upcycle.noise={self.noise} must be >= 0")
        require(0 <= self.dropped < 1, f"upcycle.dropped={self.dropped} must be in [0, 1)")
        require(0 <= self.redrawn <= 1, f"upcycle.redrawn={self.redrawn} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class EvolutionConfig:
    """How experts 2 to N follow expert 1.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    mode: EvolutionMode = "ema"  # how equation (1) is read; see evolution.evolve.follow
    # Lower ends of the ranges from which the betas of experts 2, 3, 4 are drawn at every step (paper).
    beta_low: tuple[float, ...] = (0.9, 0.8, 0.7)
    beta_high: tuple[float, ...] = (0.99, 0.89, 0.79)  # the upper ends of those ranges
    fixed_beta: float | None = None  # one beta for all of them, instead of random ones
    snapshots: tuple[float, ...] = ()  # for each, the share of the stage's steps after which it is frozen; []: never

    def __post_init__(self) -> None:
        check_field_types(self, "evolution.")
        low, high = self.beta_low, self.beta_high
        require(
            len(low) == len(high) and all(0 <= a <= b <= 1 for a, b in zip(low, high, strict=True)),
            f"evolution.beta_low={low} and beta_high={high} must be as many, with 0 <= low <= high <= 1",
        )
        fixed = self.fixed_beta
        require(fixed is None or 0 <= fixed <= 1, f"evolution.fixed_beta={fixed} must be in [0, 1]")
        require(
            all(0 < share <= 1 for share in self.snapshots),
            f"evolution.snapshots={self.snapshots} must be shares of the stage's steps in (0, 1]",
        )

    def check(self, num_experts: int) -> None:
        """Raises UserError unless each of the N - 1 followers has a range of beta, and a snapshot if there are any."""
        followers = num_experts - 1
        if self.fixed_beta is None:
            require(
                len(self.beta_low) == followers,
                f"evolution has {len(self.beta_low)} ranges of beta for {followers} evolved experts; "
                "give beta_low and beta_high one entry each, or set fixed_beta",
            )
        require(
            len(self.snapshots) in (0, followers),
            f"evolution has {len(self.snapshots)} snapshots for {followers} evolved experts",
        )


def upcycled_model(dense: ModelConfig, upcycle: UpcycleConfig, moe: AnyExpertsConfig) -> ModelConfig:
    """The dense model's configuration with experts, as wide as its FFN, in the layers that `upcycle` selects.

    Raises:
      UserError: if the model already has experts, its layers do not fit `moe_every`, or `moe` has another number of
        experts.
    """
    require(
        dense.stack.num_moe_layers == 0,
        f"upcycling starts from a dense model; this one has {dense.stack.num_moe_layers} layers with experts",
    )
    require(
        moe.num_experts == upcycle.num_experts,
        f"moe.num_experts={moe.num_experts} is not upcycle.num_experts={upcycle.num_experts}",
    )
    require(
        upcycle.num_dense_layers < dense.stack.num_layers,
        f"upcycle.num_dense_layers={upcycle.num_dense_layers} leaves none of {dense.stack.num_layers} layers",
    )
    stack = dataclasses.replace(
        dense.stack,
        num_dense_layers=upcycle.num_dense_layers,
        moe_every=upcycle.moe_every,
        expert_d_ff=dense.stack.d_ff,
        num_shared_experts=0,
    )
    return dataclasses.replace(dense, stack=stack, moe=moe)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The training options of one stage; all others are the run's.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    steps: int = 1000  # optimiser steps; 0 skips the stage
    lr: float = 1e-3  # peak learning rate, after the warm-up
    batch_size: int = 32  # sequences per step
    warmup_steps: int = 0  # steps over which the learning rate rises linearly from 0
    final_lr_fraction: float = 0.0  # final learning rate as a fraction of lr; above 0 it keeps evolved experts apart

    def __post_init__(self) -> None:
        check_field_types(self, "a stage's ")
        require(self.steps >= 0, f"a stage's steps={self.steps} must be >= 0")


def _top_1() -> AnyExpertsConfig:
    """The routing of stage III: top-1 by DTR, balance loss 0.001 (EvoMoE, equation 9).

    The combine weight has the value 1 and the gradient of the score (our reading). So the evolved experts keep their
    scale, and the router still learns from the task loss.
    """
    return AnyExpertsConfig.static_top_k(4, 1, router="dtr", normalisation="all_raw_gradient", balance_weight=0.001)


@dataclasses.dataclass(frozen=True)
class EvolveConfig:
    """The table `evolve`: the experts and the three stages.

    Raises:
      UserError: if its parts do not fit each other.
    """

    upcycle: UpcycleConfig = dataclasses.field(default_factory=UpcycleConfig)
    evolution: EvolutionConfig = dataclasses.field(default_factory=EvolutionConfig)
    # may have variable slots, for an AnyExperts model
    moe: AnyExpertsConfig = dataclasses.field(default_factory=_top_1)
    trains: Trains = "router"  # in stage III: the routers only (paper), routers and experts, or everything
    diversity: Diversity = "none"  # an auxiliary loss of stage III; see evolution.diversity
    diversity_weight: float = 0.01  # weight of that loss
    evolve_in_warm_up: bool = (
        False  # experts evolve in stage I while everything else trains; stage II has no steps then
    )
    warm_up: StageConfig = dataclasses.field(default_factory=StageConfig)  # I: the dense model
    evolving: StageConfig = dataclasses.field(default_factory=StageConfig)  # II; steps=0: stage III starts from copies
    routing: StageConfig = dataclasses.field(default_factory=StageConfig)  # III; steps=0: the run ends before it

    def __post_init__(self) -> None:
        check_field_types(self, "evolve.")
        require(self.diversity_weight >= 0, f"evolve.diversity_weight={self.diversity_weight} must be >= 0")
        require(
            self.moe.num_experts == self.upcycle.num_experts,
            f"evolve.moe.num_experts={self.moe.num_experts} is not "
            f"evolve.upcycle.num_experts={self.upcycle.num_experts}; make them agree",
        )
        require(
            not self.moe.expert_bias, "evolve.moe.expert_bias=True: stage II has no router to balance; set it False"
        )
        require(self.warm_up.steps >= 1, "evolve.warm_up.steps must be >= 1")
        require(
            not (self.evolve_in_warm_up and self.evolving.steps),
            f"evolve.evolve_in_warm_up=True leaves nothing for evolve.evolving.steps={self.evolving.steps}; set it 0",
        )
        if self.evolving.steps or self.evolve_in_warm_up:
            self.evolution.check(self.upcycle.num_experts)


@dataclasses.dataclass(frozen=True)
class EvolveRun:
    """A whole EvoMoE run: the run of the dense model, from which the stages' runs are derived, and the table `evolve`.

    Raises:
      UserError: if its parts do not fit each other, or a stage's run is invalid.
    """

    base: RunConfig
    evolve: EvolveConfig

    def __post_init__(self) -> None:
        check_field_types(self)
        start = self.base.train.start_from
        require(
            start is None or not self.evolve.evolve_in_warm_up,
            f"train.start_from={start} is for a dense model, and with evolve.evolve_in_warm_up=True there is none",
        )
        train = self.base.train
        require(
            train.trainable == TrainConfig.trainable and not train.learning_rates,
            "train.trainable and train.learning_rates: each stage of evolve says itself what it trains; leave them out",
        )
        require(
            not train.budgets and not train.keeps_start,
            "train.budgets, train.distillation and train.loss=dpo are not for evolve; train a run that starts from its "
            "last stage",
        )
        for name in STAGES:
            self.stage(name)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that have steps, in order."""
        return tuple(name for name in STAGES if getattr(self.evolve, name).steps)

    @property
    def model(self) -> ModelConfig:
        """The model with experts, as in stages II and III."""
        return upcycled_model(self.base.model, self.evolve.upcycle, self.evolve.moe)

    def stage(self, name: str) -> RunConfig:
        """The run of one stage. A stage without steps gets a run of one step, which is never started."""
        require_one_of("stage", name, STAGES)
        own: StageConfig = getattr(self.evolve, name)
        rates = {key: getattr(own, key) for key in ("lr", "warmup_steps", "final_lr_fraction")}
        amounts: dict[str, Any] = {"steps": max(own.steps, own.warmup_steps + 1), "batch_size": own.batch_size}
        dense = name == "warm_up" and not self.evolve.evolve_in_warm_up
        if not dense:
            amounts["start_from"] = None  # it starts from upcycled experts
        model = self.base.model if dense else self.model
        try:
            return dataclasses.replace(
                self.base,
                model=model,
                optim=dataclasses.replace(self.base.optim, **rates),
                train=dataclasses.replace(self.base.train, **amounts),
            )
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error


def evolve_preset_names() -> list[str]:
    """The names of the EvoMoE runs that come with the package."""
    return names_in(_presets())


def describes_evolution(source: str | pathlib.Path) -> bool:
    """Whether a preset, file or run is for `load_evolve_config` and not for `train.config.load_config`.

    Raises:
      UserError: if it is a TOML file that cannot be read.
    """
    path = pathlib.Path(source)
    if str(source) in evolve_preset_names() or path.name == CONFIG_NAME or (path / CONFIG_NAME).exists():
        return True
    return path.suffix == ".toml" and "evolve" in read_toml(source, "config", _presets())[1]


def load_evolve_config(source: str | pathlib.Path, overrides: Sequence[str] = ()) -> EvolveRun:
    """Loads an EvoMoE run from the name of a preset, a TOML file, a run directory or its evolve.json, or a published
    dense checkpoint, which stands for a run that starts from it.

    The file is like that of `train.config.load_config`, with an additional table `evolve`. Overrides can set its keys
    too: "evolve.trains=all".

    Raises:
      UserError: one line with file, key and valid keys or values.
    """
    path = pathlib.Path(source)
    published = str(source) not in evolve_preset_names() and is_published(path)
    if path.is_dir() and str(source) not in evolve_preset_names():
        path = path / CONFIG_NAME
    if published:
        name = str(source)
        values: dict[str, Any] = {"train": {"start_from": name}, "evolve": {}}
    elif path.suffix == ".json":
        name, values = str(path), _parse_evolve_json(str(path), read_text(path, "config"))
    else:
        name, values = read_toml(source, "evolve config", _presets())
    values = with_overrides(values, overrides)
    require(
        isinstance(values.get("evolve"), dict), f"{name}: no table [evolve]; `anyexperts train` takes files without"
    )
    table = values.pop("evolve")
    table["moe"] = merge(dataclasses.asdict(_top_1()), _method(table_in(table, "moe", f"{name}: evolve")))
    base = run_config(name, values)
    try:
        return EvolveRun(base, build(EvolveConfig, table, "evolve."))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _method(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table evolve.moe, also of earlier versions. Their buffer options are removed: model.stack.execution has them
    now, for the whole run, and drops nothing by default."""
    method = {key: value for key, value in table.items() if key not in ("capacity_factor", "overflow")}
    return move_keys(method, ("model", "moe"))


def _parse_evolve_json(name: str, text: str) -> dict[str, Any]:
    """The tables of an evolve.json in the layout of a TOML file: those of the base run, and `evolve`."""
    values = parse_json_object(text, name)
    return {**table_in(values, "base", name), "evolve": table_in(values, "evolve", name)}


def _presets() -> Traversable:
    return importlib.resources.files("anyexperts_jax.evolution") / "configs"
