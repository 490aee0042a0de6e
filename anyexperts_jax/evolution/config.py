"""What an EvoMoE run is made of: how experts begin, how they evolve, and the three stages."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.train.config import (
    RunConfig,
    names_in,
    parse_override,
    read_toml,
    run_config,
)
from anyexperts_jax.train.moved import move_keys
from anyexperts_jax.train.strict import build, merge

ExpertInit = Literal["copy", "noise", "dropout", "random_subset"]
EvolutionMode = Literal["ema", "lag", "literal"]
Trains = Literal["router", "moe", "all"]
Diversity = Literal["none", "contrastive", "local_entropy"]
STAGES = ("warm_up", "evolving", "routing")


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """Which layers get experts, how many, and how they differ at the start.

    "copy": not at all, the model computes what the dense one did wherever combine weights sum to one. The others are
    baselines for diversity; expert 1 always is the dense FFN itself (our reading). "noise": normal noise. "dropout":
    single weights at zero, the others scaled up. "random_subset": a random part of the FFN's units drawn anew, with
    the mean and standard deviation of the weights they replace (as in Drop-Upcycling).

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    num_experts: int = 4
    moe_every: int = 2  # alternating layers, the second of each two (EvoMoE does not say which)
    num_dense_layers: int = 0  # leading layers that stay dense
    init: ExpertInit = "copy"
    noise: float = 0.1  # standard deviation over the weights' root mean square
    dropped: float = 0.1  # share of weights at zero
    redrawn: float = 0.5  # share of units drawn anew

    def __post_init__(self) -> None:
        require_one_of("upcycle.init", self.init, get_args(ExpertInit))
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

    mode: EvolutionMode = "ema"
    beta_low: tuple[float, ...] = (0.9, 0.8, 0.7)  # of experts 2, 3, 4: beta is drawn anew at each step (paper)
    beta_high: tuple[float, ...] = (0.99, 0.89, 0.79)
    fixed_beta: float | None = None  # one beta for all of them, and no draw
    snapshots: tuple[float, ...] = ()  # share of the stage's steps after which each stays as it is; (): none does

    def __post_init__(self) -> None:
        require_one_of("evolution.mode", self.mode, get_args(EvolutionMode))
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
        """Raises UserError unless there is a range of beta, and a snapshot if any, for each of the N - 1 followers."""
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
    """The dense model's configuration with experts as wide as its FFN in the layers `upcycle` names.

    Raises:
      UserError: when the model has experts already, its layers do not fit `moe_every`, or `moe` has another number of
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
    """One stage's training; what it does not name is the run's.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 32
    warmup_steps: int = 0
    final_lr_fraction: float = 0.0  # of lr, at the end of the cosine; a floor keeps evolved experts apart

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"a stage's steps={self.steps} must be >= 0")


def _top_1() -> AnyExpertsConfig:
    """Stage III's routing: top-1 by DTR, balance loss 0.001 (EvoMoE, equation 9).

    The weight's value is 1 and its gradient the score's (our reading): the evolved experts keep their scale, and the
    router learns from the answer.
    """
    return AnyExpertsConfig.static_top_k(4, 1, router="dtr", normalisation="all_raw_gradient", balance_weight=0.001)


@dataclasses.dataclass(frozen=True)
class EvolveConfig:
    """The table `evolve`: the experts, and the three stages.

    Raises:
      UserError: when its parts do not fit each other.
    """

    upcycle: UpcycleConfig = dataclasses.field(default_factory=UpcycleConfig)
    evolution: EvolutionConfig = dataclasses.field(default_factory=EvolutionConfig)
    moe: AnyExpertsConfig = dataclasses.field(default_factory=_top_1)  # variable slots too, for an AnyExperts model
    trains: Trains = "router"  # in stage III: the routers alone (paper), they and the experts, or everything
    diversity: Diversity = "none"  # a loss of stage III: see evolution.diversity
    diversity_weight: float = 0.01
    evolve_in_warm_up: bool = False  # experts evolve in stage I, where all else trains too; stage II has no steps
    warm_up: StageConfig = dataclasses.field(default_factory=StageConfig)  # I: the dense model
    evolving: StageConfig = dataclasses.field(default_factory=StageConfig)  # II; no steps: stage III starts from copies
    routing: StageConfig = dataclasses.field(default_factory=StageConfig)  # III; no steps: the run ends before it

    def __post_init__(self) -> None:
        require_one_of("evolve.trains", self.trains, get_args(Trains))
        require_one_of("evolve.diversity", self.diversity, get_args(Diversity))
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
    """A whole EvoMoE run: the dense model's run, from which every stage's is made, and the table `evolve`.

    Raises:
      UserError: when its parts do not fit each other, as every stage's run must.
    """

    base: RunConfig
    evolve: EvolveConfig

    def __post_init__(self) -> None:
        start = self.base.train.start_from
        require(
            start is None or not self.evolve.evolve_in_warm_up,
            f"train.start_from={start} is for a dense model, and with evolve.evolve_in_warm_up=True there is none",
        )
        for name in STAGES:
            self.stage(name)

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that have steps, in order."""
        return tuple(name for name in STAGES if getattr(self.evolve, name).steps)

    @property
    def model(self) -> ModelConfig:
        """The model with experts, of stages II and III."""
        return upcycled_model(self.base.model, self.evolve.upcycle, self.evolve.moe)

    def stage(self, name: str) -> RunConfig:
        """The run of one stage; a stage of no steps has one of one, that is never begun."""
        require_one_of("stage", name, STAGES)
        own: StageConfig = getattr(self.evolve, name)
        rates = {key: getattr(own, key) for key in ("lr", "warmup_steps", "final_lr_fraction")}
        amounts: dict[str, Any] = {"steps": max(own.steps, own.warmup_steps + 1), "batch_size": own.batch_size}
        dense = name == "warm_up" and not self.evolve.evolve_in_warm_up
        if not dense:
            amounts["start_from"] = None  # it starts from experts made here
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
    """The EvoMoE runs that come with the package."""
    return names_in(_presets())


def load_evolve_config(source: str | pathlib.Path, overrides: Sequence[str] = ()) -> EvolveRun:
    """The EvoMoE run of a preset's name, a TOML file or a run's evolve.json.

    The file is as for `train.config.load_config`, with one more table, `evolve`. Overrides too: "evolve.trains=all".

    Raises:
      UserError: one line with file, key and valid keys or values.
    """
    path = pathlib.Path(source)
    if path.suffix == ".json":
        name, values = str(path), parse_json_object(read_text(path, "config"), str(path))
        base = values.get("base", {})
        require(isinstance(base, dict), f"{path}: base is not a JSON object")
        values = {**base, "evolve": values.get("evolve", {})}
    else:
        name, values = read_toml(source, "evolve config", _presets())
    for override in overrides:
        values = merge(values, move_keys(parse_override(override)))
    require(
        isinstance(values.get("evolve"), dict), f"{name}: no table [evolve]; `anyexperts train` takes files without"
    )
    table = values.pop("evolve")
    table["moe"] = merge(dataclasses.asdict(_top_1()), _method(table.get("moe", {})))
    base = run_config(name, values)
    try:
        return EvolveRun(base, build(EvolveConfig, table))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _method(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table evolve.moe, of before too: what it said of buffers is now the whole run's, which drops nothing unless
    model.stack.execution says so."""
    method = {key: value for key, value in table.items() if key not in ("capacity_factor", "overflow")}
    return move_keys(method, ("model", "moe"))


def _presets() -> Traversable:
    return importlib.resources.files("anyexperts_jax.evolution") / "configs"
