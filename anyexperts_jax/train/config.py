"""`RunConfig`: everything that defines a run, read strictly from TOML and overrides."""

import dataclasses
import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from typing import Any, Literal

from anyexperts_jax.core.checks import Seed, check_field_types
from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.plugins import load_plugins
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.encode import require_fits_model
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.sharding.mesh import MeshConfig
from anyexperts_jax.train.config_files import names_in, read_toml, table_in, with_overrides
from anyexperts_jax.train.curriculum import budget_windows
from anyexperts_jax.train.moved import move_keys
from anyexperts_jax.train.optim import OptimConfig
from anyexperts_jax.train.published_config import is_published, with_start
from anyexperts_jax.train.rates import named_rates
from anyexperts_jax.train.run_tokenizer import ids_of_tokenizer
from anyexperts_jax.train.runtime import RuntimeConfig
from anyexperts_jax.train.strict import build, merge

OnNonfinite = Literal["stop", "skip"]
Loss = Literal["answers", "dpo"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    steps: int = 1000  # optimiser steps
    batch_size: int = 32  # sequences per step
    accumulation: int = 1  # micro-batches per step, computed one after the other
    log_every: int = 10  # steps between records of metrics.jsonl and TensorBoard
    checkpoint_every: int = 100  # steps between checkpoints
    eval_every: int = 100  # steps between validations; a multiple of checkpoint_every, so that each state is saved
    eval_examples: int = 64  # validation examples per domain
    keep_last: int = 2  # number of latest checkpoints kept, in addition to the one with the lowest validation loss
    on_nonfinite: OnNonfinite = "stop"  # stop: end the run; skip: discard the step's update and count it
    start_from: str | None = None  # a run or a published checkpoint to take the initial parameters from
    trainable: tuple[str, ...] = ("**",)  # patterns over parameter names: **/router/**; the rest is frozen
    learning_rates: tuple[str, ...] = ()  # "PATTERN=RATE": a peak rate in place of optim.lr; the last match counts

    loss: Loss = "answers"  # answers: their cross entropy; dpo: of pairs, the chosen answer over the rejected one
    dpo_beta: float = 0.1  # with dpo, how near the model stays to the one the run began with; larger: nearer
    budgets: tuple[float, ...] = ()  # in real experts per token; each step draws one; empty: the model's window
    distillation: float = 0.0  # share of the loss that compares with the run's initial model at its own window
    hidden_distillation: float = 0.0  # weight of the squared distance from its hidden states, beside distillation

    @property
    def keeps_start(self) -> bool:
        """Whether a step compares with the model as the run began, of which the optimiser's state then has a copy."""
        return bool(self.distillation) or self.loss == "dpo"

    def __post_init__(self) -> None:
        check_field_types(self, "train.")
        sizes = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "eval_every", "eval_examples")
        for name in (*sizes, "keep_last"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be >= 1")
        require(
            len(self.trainable) > 0, "train.trainable is empty: nothing would train; give patterns, or leave it out"
        )
        named_rates(self.learning_rates)
        require(0 <= self.distillation <= 1, f"train.distillation={self.distillation} must be in [0, 1]")
        require(
            self.distillation == 0 or self.start_from is not None,
            f"train.distillation={self.distillation} without train.start_from: the model as the run begins is the "
            "teacher, and it would have learned nothing",
        )
        hidden = self.hidden_distillation
        require(0 <= hidden < float("inf"), f"train.hidden_distillation={hidden} must be finite and >= 0")
        require(
            hidden == 0 or self.distillation > 0,
            f"train.hidden_distillation={hidden} without train.distillation, beside which it is a term; set that too",
        )
        require(0 < self.dpo_beta < float("inf"), f"train.dpo_beta={self.dpo_beta} must be finite and > 0")
        if self.loss == "dpo":
            require(
                self.start_from is not None,
                "train.loss='dpo' without train.start_from: the model as the run begins is the reference, and it would "
                "have learned nothing",
            )
            require(
                self.distillation == 0,
                f"train.distillation={self.distillation} beside train.loss='dpo': each has its own loss; choose one",
            )
        require(all(self.trainable), "train.trainable holds an empty pattern; write ** for all parameters")
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
    """A whole run. Two runs of one configuration on the same kind of machine give the same losses.

    Raises:
      UserError: if its parts do not fit each other.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    seed: Seed = 0  # seed of the initial parameters and of randomness in a step; the data have their own
    plugins: tuple[str, ...] = ()  # modules to import first; they add to the registries of core.registries

    def __post_init__(self) -> None:
        check_field_types(self)
        require_fits_model(self.data.encoding, self.model, self.data.tokenizer)
        scope = self.model.moe.switches.balance_scope
        require(
            self.data.packing == "none" or scope == "batch",
            f"data.packing={self.data.packing!r} with model.moe.switches.balance_scope={scope!r}: that balance loss is "
            "computed per row, but packing puts several examples into a row; set the former to none or the latter to "
            "batch",
        )
        require(
            self.train.loss == "answers" or scope == "batch",
            f"train.loss={self.train.loss!r} with model.moe.switches.balance_scope={scope!r}: that balance loss is "
            "computed per row, but a row holds both answers; set it to batch",
        )
        budget_windows(self.model, self.train.budgets)
        require(
            not self.model.moe.bias_by_modality,
            "model.moe.bias_by_modality=True: the rule that balances the load by the expert bias has one bias for all "
            "tokens; such a model runs, but is not trained",
        )
        require(
            self.model.stack.lora is None or self.train.trainable != TrainConfig.trainable,
            "model.stack.lora beside train.trainable=['**'] would train the base as well; set train.trainable to the "
            "adapters, ['**/*_lora_*'], and what else is to be trained",
        )
        length, parts = self.data.encoding.max_length, self.mesh.sequence
        require(
            parts == -1 or length % parts == 0,
            f"data.encoding.max_length={length} does not split over mesh.sequence={parts}; make it a multiple",
        )
        require(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} must be below train.steps={self.train.steps}",
        )


def preset_names() -> list[str]:
    """The names of the run configurations that come with the package."""
    return names_in(_presets())


def load_config(source: str | pathlib.Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> RunConfig:
    """Loads a run configuration from the name of a preset, a TOML file, a run's config.json, or a published checkpoint.

    A TOML file has the tables of `RunConfig`; `preset = "tiny"` at its top makes that model preset the base of the
    table `model`. An override is `key=value` with a dotted key and a TOML value: "optim.lr=1e-3",
    "model.moe.switches.iar=off" (a bare word is a string). `plugins` are modules to import before the configuration is
    read; the run records them. A published checkpoint stands for a run that starts from it, with its model. With a
    tokenizer other than bytes, the model's `vocab_size`, `pad_id` and `eos_id` are taken from the tokenizer unless they
    are given.

    Raises:
      UserError: one line with file, key and valid keys or values.
    """
    name, values = _read(source)
    values = with_overrides(move_keys(values), overrides)
    if plugins:
        values["plugins"] = list(dict.fromkeys([*_plugins(values), *plugins]))
    return run_config(name, values)


def run_config(name: str, values: dict[str, Any]) -> RunConfig:
    """The run configuration from the tables of a file; `name` is the file's, for messages.

    Raises:
      UserError: one line with name, key and valid keys or values.
    """
    values = move_keys(values)
    preset, model = values.pop("preset", None), table_in(values, "model", name)
    try:
        base = {} if preset is None else dataclasses.asdict(model_preset(str(preset)))
        _load_plugins(values)
        values = with_start(values, preset)
        model = values.get("model", model)
        base |= ids_of_tokenizer(values.get("data"), model)
        if base:
            values["model"] = merge(base, model)
        return build(RunConfig, values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _load_plugins(values: dict[str, Any]) -> None:
    """Imports the plugins before anything else is read, because the configuration may name what they register."""
    load_plugins(_plugins(values))


def _plugins(values: dict[str, Any]) -> tuple[str, ...]:
    """The plugin modules named in a file's tables. Anything that is not a string is left for `build` to report."""
    given = values.get("plugins", ())
    names = given if isinstance(given, list | tuple) else (given,)
    return tuple(name for name in names if isinstance(name, str))


def to_json(config: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, name: str = "config.json") -> RunConfig:
    """The inverse of `to_json`; `name` is for messages.

    Raises:
      UserError: if the text is not a JSON object, or not a configuration of this version.
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
    """The name (for messages) and the raw values of a preset or file."""
    path = pathlib.Path(source)
    if str(source) not in preset_names() and is_published(path):
        return str(path), {"train": {"start_from": str(path)}}
    if path.is_dir() and str(source) not in preset_names():
        path = path / "config.json"
    if path.suffix == ".json":
        return str(path), dataclasses.asdict(from_json(read_text(path, "config"), str(path)))
    return read_toml(source, "config", _presets())


def describe_differences(differences: dict[str, tuple[Any, Any]]) -> str:
    """The differing keys with both values, on one line: "optim.lr (0.001, was 0.01)"."""
    return comma_list(f"{key} ({ours!r}, was {theirs!r})" for key, (ours, theirs) in differences.items())
