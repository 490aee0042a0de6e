"""`RunConfig`: everything that decides what a run does, from TOML and overrides, strictly."""

import dataclasses
import importlib.resources
import json
import pathlib
import tomllib
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.plugins import load_plugins
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.encode import require_fits_model
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.sharding.mesh import MeshConfig
from anyexperts_jax.train.moved import move_keys
from anyexperts_jax.train.optim import OptimConfig
from anyexperts_jax.train.run_tokenizer import ids_of_tokenizer
from anyexperts_jax.train.runtime import RuntimeConfig
from anyexperts_jax.train.strict import build, closest, merge

OnNonfinite = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    steps: int = 1000
    batch_size: int = 32  # sequences per step
    accumulation: int = 1  # micro-batches a step is computed in, one after the other
    log_every: int = 10  # steps between records of metrics.jsonl and TensorBoard
    checkpoint_every: int = 100  # steps
    eval_every: int = 100  # steps; a multiple of checkpoint_every, so that every evaluated state is a checkpoint
    eval_examples: int = 64  # of each domain's validation split
    keep_last: int = 2  # checkpoints; the one with the lowest validation loss is kept besides
    on_nonfinite: OnNonfinite = "stop"  # skip: the step changes nothing and is counted
    start_from: str | None = None  # a run, whose last parameters the first step starts with; see train.warm_start

    def __post_init__(self) -> None:
        sizes = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "eval_every", "eval_examples")
        for name in (*sizes, "keep_last"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be >= 1")
        require_one_of("train.on_nonfinite", self.on_nonfinite, get_args(OnNonfinite))
        require(
            self.batch_size % self.accumulation == 0,
            f"train.accumulation={self.accumulation} must divide train.batch_size={self.batch_size}",
        )
        require(
            self.eval_every % self.checkpoint_every == 0,
            f"train.eval_every={self.eval_every} must be a multiple of train.checkpoint_every={self.checkpoint_every}",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. Two runs of one config on one kind of machine give the same losses.

    Raises:
      UserError: when its parts do not fit each other.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    seed: int = 0  # of the parameters and of what is random in a step; the data have their own
    plugins: tuple[str, ...] = ()  # modules that are imported first; they add to the registries of core.registries

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed} must be >= 0")
        require_fits_model(self.data.encoding, self.model, self.data.tokenizer)
        scope = self.model.moe.switches.balance_scope
        require(
            self.data.packing == "none" or scope == "batch",
            f"data.packing={self.data.packing!r} with model.moe.switches.balance_scope={scope!r}: that balance loss is "
            "of a row, which packing fills with several examples; set the former to none or the latter to batch",
        )
        require(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} must be below train.steps={self.train.steps}",
        )


def preset_names() -> list[str]:
    """The run configurations that come with the package."""
    return names_in(_presets())


def load_config(source: str | pathlib.Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> RunConfig:
    """The run configuration of a preset's name, a TOML file or a run's config.json.

    A TOML file holds the tables of `RunConfig`; `preset = "tiny"` at its top takes that model preset as the base of
    the table `model`. An override is `key=value` with a dotted key, its value as TOML has it: "optim.lr=1e-3",
    "model.moe.switches.iar=off" (a bare word is a string). `plugins` are modules to import before the configuration is
    read; the run records them. With a tokenizer other than bytes, `vocab_size`, `pad_id` and `eos_id` of the model are
    the tokenizer's unless they are given.

    Raises:
      UserError: one line with file, key and valid keys or values.
    """
    name, values = _read(source)
    values = move_keys(values)
    for override in overrides:
        values = merge(values, move_keys(parse_override(override)))
    if plugins:
        values["plugins"] = list(dict.fromkeys([*values.get("plugins", ()), *plugins]))
    return run_config(name, values)


def run_config(name: str, values: dict[str, Any]) -> RunConfig:
    """The run configuration of a file's tables, read; `name` is for messages.

    Raises:
      UserError: one line with name, key and valid keys or values.
    """
    values = move_keys(values)
    preset = values.pop("preset", None)
    try:
        base = {} if preset is None else dataclasses.asdict(model_preset(str(preset)))
        _load_plugins(values)
        base |= ids_of_tokenizer(values.get("data"), values.get("model"))
        if base:
            values["model"] = merge(base, values.get("model", {}))
        return build(RunConfig, values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _load_plugins(values: dict[str, Any]) -> None:
    """Before all else is read: the configuration may name what they register."""
    plugins = values.get("plugins", ())
    if isinstance(plugins, list | tuple) and all(isinstance(name, str) for name in plugins):
        load_plugins(plugins)


def to_json(config: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, name: str = "config.json") -> RunConfig:
    """The inverse of `to_json`; `name` is for messages.

    Raises:
      UserError: when the text is no JSON object, or no configuration of this version.
    """
    values = parse_json_object(text, name)
    try:
        values = move_keys(values)
        _load_plugins(values)
        return build(RunConfig, values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _presets() -> Traversable:
    return importlib.resources.files("anyexperts_jax.train") / "configs"


def _read(source: str | pathlib.Path) -> tuple[str, dict[str, Any]]:
    """Name for messages and raw values of a preset or file."""
    path = pathlib.Path(source)
    if path.suffix == ".json":
        return str(path), dataclasses.asdict(from_json(read_text(path, "config"), str(path)))
    return read_toml(source, "config", _presets())


def read_toml(source: str | pathlib.Path, kind: str, presets: Traversable) -> tuple[str, dict[str, Any]]:
    """Name for messages and raw values of a TOML file, or of one of the folder `presets` by its name."""
    path = pathlib.Path(source)
    if path.suffix == ".toml":
        return str(path), parse_toml(str(path), read_text(path, "config"))
    known = names_in(presets)
    if str(source) not in known:
        raise UserError(f"no {kind} {str(source)!r}; {closest(str(source), known)}, or a path to a .toml file")
    return f"config {source}", parse_toml(f"config {source}", (presets / f"{source}.toml").read_text())


def names_in(presets: Traversable) -> list[str]:
    """Of the TOML files in a folder of the package."""
    return sorted(path.name.removesuffix(".toml") for path in presets.iterdir() if path.name.endswith(".toml"))


def parse_toml(name: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of the latter kinds: numbers too long, tables too deep
        raise UserError(f"{name}: not valid TOML: {error}") from error


def parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    require(bool(equals) and all(parts), f"override {override!r} is not key=value, as in optim.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in reversed(parts):
        value = {part: value}
    return value


def describe_differences(differences: dict[str, tuple[Any, Any]]) -> str:
    """Keys with both values, in one line: "optim.lr (0.001, was 0.01)"."""
    return comma_list(f"{key} ({ours!r}, was {theirs!r})" for key, (ours, theirs) in differences.items())
