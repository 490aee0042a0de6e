"""`Experiment`: a table or figure as variants of one run times seeds, read strictly from a TOML file."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.core.files import read_text
from anyexperts_jax.evolution.config import STAGES, EvolveConfig, EvolveRun, load_evolve_config
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.train.config import RunConfig, load_config
from anyexperts_jax.train.config_files import parse_toml
from anyexperts_jax.train.moved import MOVED
from anyexperts_jax.train.strict import build, closest, flatten, merge
from experiments.reproduce.code_version import CODE_VERSION

TABLES = ("table1", "table2", "table3", "figure3", "figure4", "figure5")
EVOMOE_TABLES = (
    "evomoe-components",
    "evomoe-routers",
    "evomoe-diversity",
    "evomoe-beta",
    "evomoe-experts",
    "evomoe-slots",
)
GROUPS = {"all": TABLES, "evomoe": EVOMOE_TABLES}  # one group per paper: tables that share their runs and a page
EVOLVES = "evolve_and_evaluate"  # the recipe whose base has a table `evolve`
CONFIGS = pathlib.Path("experiments") / "configs"  # under the current directory; a checkout has them
SCALES = {"tiny": CONFIGS, "small": CONFIGS / "small"}  # the same tables for two cores or one accelerator
_ID_LENGTH = 12
_START_SEEDS = 1000  # above a variant's seed
_LABELS = ("name", "keep", "stage")
_EXAMPLES = ("test_examples", "validation_examples")  # of `Amounts` and of `Quick`
_NOTHING = object()


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How many examples measure every run of an experiment."""

    test_examples: int = 256  # of each domain
    validation_examples: int = 32
    model_baselines: bool = True  # AUC of token scores from the router, gradient and embeddings

    def __post_init__(self) -> None:
        for name in _EXAMPLES:
            require(getattr(self, name) >= 1, f"evaluation.{name}={getattr(self, name)} must be >= 1")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The base run with the overrides `set`, evaluated at the nominal budgets `budgets`."""

    name: str
    set: tuple[str, ...] = ()  # as `anyexperts train --set` takes them
    budgets: tuple[float, ...] = ()  # real experts per token; empty for the trained budget
    seeds: tuple[int, ...] | None = None  # None for the experiment's
    stage: int = 1  # all seeds of a stage run before the next stage
    keep: tuple[int, ...] = ()  # seeds whose checkpoint is kept for pictures
    stages: tuple[str, ...] = STAGES  # EvoMoE's stages that the run goes through; it is measured after the last

    def __post_init__(self) -> None:
        for name in self.stages:
            require_one_of(f"variant {self.name!r}: stage", name, STAGES)


@dataclasses.dataclass(frozen=True)
class Quick:
    """The changes of --quick: fewer seeds and examples, and overrides of every variant."""

    seeds: tuple[int, ...] = (0,)
    set: tuple[str, ...] = ()
    test_examples: int = 16  # a maximum, as is the next
    validation_examples: int = 16

    def __post_init__(self) -> None:
        _require_seeds("quick.seeds", self.seeds)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Raises:
      UserError: that names the value and the rule it breaks.
    """

    title: str
    base: str  # the run to vary: a .toml in the experiment's folder, or a preset of `anyexperts train`
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipe: str = "train_and_evaluate"  # how a run is made, see `recipes`
    start: str | None = None  # a run named like `base`, trained once per seed; that seed's variants start from its end
    evaluation: Amounts = dataclasses.field(default_factory=Amounts)
    quick: Quick = dataclasses.field(default_factory=Quick)

    def __post_init__(self) -> None:
        _require_seeds("seeds", self.seeds)
        require(
            self.start is None or self.recipe != EVOLVES,
            f"start={self.start!r}: recipe {EVOLVES!r} has its stage I to start from; leave start out",
        )
        require(len(self.variants) > 0, "variants is empty; give at least one [[variants]]")
        names = [variant.name for variant in self.variants]
        require(len(set(names)) == len(names), f"two variants have the same name, of {comma_list(names)}")
        for variant in self.variants:
            _require_seeds(f"variant {variant.name!r}: seeds", self.seeds if variant.seeds is None else variant.seeds)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run with its evaluation; several tables may share it."""

    name: str
    config: RunConfig
    budgets: tuple[float, ...]
    evaluation: Amounts
    recipe: str
    keep: bool = False
    stage: int = 1
    evolve: EvolveConfig | None = None  # the settings that recipe EVOLVES adds to `config`
    start: RunConfig | None = None  # the run from whose end it starts; None to train from scratch

    @functools.cached_property
    def id(self) -> str:
        """Returns a hash of everything that decides the result, and of none of `_LABELS`; equal ids mean the same run.

        It covers the whole configuration including defaults, and the version of the code, so a changed default or
        computation makes another run, which does not reuse the earlier result.
        """
        parts = {name: value for name, value in dataclasses.asdict(self).items() if name not in _LABELS}
        return _digest({"code": CODE_VERSION, **parts})

    @functools.cached_property
    def older_id(self) -> str:
        """Returns the run's id in results committed before ids covered defaults and the version of the code."""
        apart = ("config", "evolve", "start", *_LABELS)
        others = {name: value for name, value in dataclasses.asdict(self).items() if name not in apart}
        parts = {"config": _unusual(self.config, RunConfig()), **others}
        if self.evolve is not None:
            parts["evolve"] = _unusual(self.evolve, EvolveConfig(), ("model",))  # only keys below moe moved in it
        if self.start is not None:
            parts["start"] = _unusual(self.start, RunConfig())
        return _digest(parts)

    @property
    def moe(self) -> AnyExpertsConfig:
        """Returns the routing policy that the run is measured with."""
        return self.config.model.moe if self.evolve is None else self.evolve.moe

    @property
    def evolve_run(self) -> EvolveRun:
        """Returns the stages of a run that evolves its experts."""
        assert self.evolve is not None
        return EvolveRun(self.config, self.evolve)


def evolve_digest(run: EvolveRun) -> str:
    """Returns a digest that is equal for the same stages under one version of the code."""
    return _digest({"code": CODE_VERSION, **dataclasses.asdict(run)})


def config_digest(config: RunConfig) -> str:
    """Returns a digest that is equal for the same training run under one version of the code."""
    return _digest({"code": CODE_VERSION, "config": dataclasses.asdict(config)})


def _unusual(config: Any, usual: Any, root: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the values that differ from the defaults, under the older keys; `root` is the path of `config`."""
    known = flatten(usual)
    below = {old[len(root) :]: new[len(root) :] for old, new in MOVED.items() if new[: len(root)] == root}
    now = {".".join(new): ".".join(old) for old, new in below.items()}
    return {now.get(key, key): value for key, value in flatten(config).items() if value != known.get(key, _NOTHING)}


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_ID_LENGTH]


def load_experiment(source: str | pathlib.Path, configs: pathlib.Path = CONFIGS) -> tuple[Experiment, pathlib.Path]:
    """Loads the experiment of a name in the folder `configs`, or of a .toml file; returns it with its path.

    Raises:
      UserError: if there is no such file, or for a bad key or value, with the valid ones.
    """
    path = pathlib.Path(source)
    if path.suffix != ".toml":
        path = configs / f"{source}.toml"
        require(
            configs.is_dir(),
            f"no folder {configs} here, where the experiments lie; run this in a checkout, or give a path to a .toml",
        )
        every = [name for tables in GROUPS.values() for name in tables]
        names = [name for name in every if (configs / f"{name}.toml").exists()]
        require(path.exists(), f"no experiment {str(source)!r}; {closest(str(source), names)}, or a path to a .toml")
    values = _read(path)
    try:
        return build(Experiment, values), path
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def runs_of(
    experiment: Experiment, path: pathlib.Path, *, quick: bool = False, overrides: Sequence[str] = ()
) -> dict[tuple[str, int], Run]:
    """Returns the experiment's runs by variant and seed, in running order: by stage, seed and variant.

    Args:
      path: the experiment's file, for messages and to find the base in its folder.
      quick: whether to use the experiment's fewer seeds and steps.
      overrides: applied to every variant.

    Raises:
      UserError: if a variant's overrides or budgets do not fit the base.
    """
    amounts = experiment.evaluation
    if quick:
        fewer = {name: min(getattr(amounts, name), getattr(experiment.quick, name)) for name in _EXAMPLES}
        amounts = dataclasses.replace(amounts, **fewer)
    wanted = []
    for place, variant in enumerate(experiment.variants):
        seeds = experiment.seeds if variant.seeds is None else variant.seeds
        if quick:
            seeds = tuple(seed for seed in seeds if seed in experiment.quick.seeds) or seeds[:1]
        wanted += [(variant.stage, order, place, seed) for order, seed in enumerate(seeds)]
    found = {}
    for _, _, place, seed in sorted(wanted):
        variant = experiment.variants[place]
        quicker = experiment.quick.set if quick else ()
        laid_over = (*quicker, *overrides, f"seed={seed}", f"data.seed={seed}")
        try:
            run = _run_of(experiment, path, variant, (*variant.set, *laid_over), seed, amounts)
            given = run.config.train.start_from
            require(
                given is None or experiment.start is None, f"train.start_from={given} beside start: give one of them"
            )
            found[variant.name, seed] = dataclasses.replace(run, start=_start_of(experiment, path, quicker, seed))
        except UserError as error:
            raise UserError(f"{path}, variant {variant.name!r}: {error}") from error
    return found


def _run_of(
    experiment: Experiment, path: pathlib.Path, variant: Variant, overrides: Sequence[str], seed: int, amounts: Amounts
) -> Run:
    evolve, base = None, _base(experiment.base, path)
    if experiment.recipe == EVOLVES:
        left_out = [f"evolve.{name}.steps=0" for name in STAGES if name not in variant.stages]
        loaded = load_evolve_config(base, (*overrides, *left_out))
        config, evolve = loaded.base, loaded.evolve
    else:
        config = load_config(base, overrides)
    keep = seed in variant.keep
    run = Run(variant.name, config, (), amounts, experiment.recipe, keep=keep, stage=variant.stage, evolve=evolve)
    budgets = tuple(float(one) for one in variant.budgets) or (run.moe.expected_real_slots,)
    for budget in budgets:
        shift_budget(run.moe, budget)
    return dataclasses.replace(run, budgets=budgets)


def _start_of(experiment: Experiment, path: pathlib.Path, overrides: Sequence[str], seed: int) -> RunConfig | None:
    """Returns the start with a seed that no variant has, so it sees other training examples than its variants."""
    if experiment.start is None:
        return None
    seeds = (f"seed={seed}", f"data.seed={seed + _START_SEEDS}")
    return load_config(_base(experiment.start, path), (*overrides, *seeds))


def shared(runs: Sequence[Mapping[tuple[str, int], Run]]) -> list[Run]:
    """Returns the runs of several experiments, each once, by stage and seed; kept if any experiment keeps it."""
    found: dict[str, Run] = {}
    for run in (run for each in runs for run in each.values()):
        known = found.get(run.id, run)
        merged = {"keep": known.keep or run.keep, "stage": min(known.stage, run.stage)}
        found[run.id] = dataclasses.replace(known, **merged)  # type: ignore[arg-type]
    return sorted(found.values(), key=lambda run: (run.stage, run.config.seed))


def run_to_json(run: Run) -> str:
    return json.dumps(dataclasses.asdict(run)) + "\n"


def run_from_json(text: str) -> Run:
    """Inverts `run_to_json`."""
    values: dict[str, Any] = json.loads(text)
    return build(Run, values)


def _read(path: pathlib.Path, above: tuple[pathlib.Path, ...] = ()) -> dict[str, Any]:
    """Reads the file's tables over those of the file in the same folder that its key `like` names."""
    values = parse_toml(str(path), read_text(path, "experiment"))
    like = values.pop("like", None)
    if like is None:
        return values
    other, above = path.parent / str(like), (*above, path.resolve())
    require(other.resolve() not in above, f"{path}: like={like!r} names the file itself, or one that is like it")
    return merge(_read(other, above), values)


def _base(name: str, path: pathlib.Path) -> str:
    beside = path.parent / name
    return str(beside) if name.endswith(".toml") else name


def _require_seeds(name: str, seeds: Sequence[int]) -> None:
    require(len(seeds) > 0, f"{name} is empty; give at least one seed")
    require(len(set(seeds)) == len(seeds), f"{name}={list(seeds)} names a seed twice")
    require(min(seeds) >= 0, f"{name}={list(seeds)} must be >= 0")
