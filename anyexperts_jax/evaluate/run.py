"""The Python front door: `load_run` and `train` return a `Run`, which evaluates, answers and traces its routing."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.data.batches import stack
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Item
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.pipeline import eval_batches
from anyexperts_jax.data.sequence import padded
from anyexperts_jax.data.turns import chat_template, encode_item
from anyexperts_jax.evaluate.ask import MAX_NEW_TOKENS, Reply, ask, own_example
from anyexperts_jax.evaluate.evaluate import Options, evaluate_trained
from anyexperts_jax.evaluate.results import EvaluationResult, save_evaluation
from anyexperts_jax.evaluate.token_routing import TokenRouting, trace_batch
from anyexperts_jax.evaluate.trained import Trained, load_trained
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.train.config import RunConfig, load_config
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_lock import run_lock

UNNAMED = "custom"  # the directory in runs/ for a configuration without a name


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
    """The examples of a run's domains, and batches of them in the shapes that its model reads."""

    config: DataConfig
    tokenizer: Tokenizer

    def example(self, domain: str, split: str = "test", index: int = 0) -> Item:
        """Returns one example of a domain: question, answer, picture or sound, and the evidence in them.

        An example of a user's own data may be a `Conversation` or a `Document`.

        Args:
          split: "train", "validation" or "test".
          index: from 0.

        Raises:
          UserError: if the domain or split is unknown, or the domain's folder has fewer examples.

        Example:
            >>> import anyexperts_jax as ax
            >>> run = ax.load_run("runs/smoke")
            >>> example = run.data.example("general", "test", 3)
            >>> example.image.shape, example.image.dtype.name
            ((48, 48, 3), 'uint8')
        """
        require(index >= 0, f"index={index} must be >= 0")
        return open_source(self.config, domain, split, index + 1)[index]

    def batch(self, domain: str, split: str = "test", rows: int = 8) -> Batch:
        """Returns a batch of the first `rows` examples of a domain's split: arrays [rows, T, ...], T positions.

        Raises:
          UserError: if the domain or split is unknown, or the domain's folder has fewer examples.

        Example:
            >>> import anyexperts_jax as ax
            >>> run = ax.load_run("runs/smoke")
            >>> batch = run.data.batch("nlp", "test", rows=2)
            >>> batch.tokens_BT.shape
            (2, 128)
        """
        require(rows >= 1, f"rows={rows} must be >= 1")
        return next(eval_batches(self.config, domain, split, rows, rows))

    def encode(self, examples: Sequence[Item]) -> Batch:
        """Encodes examples, also the user's own, as a batch with a row each: arrays [rows, T, ...], T positions.

        Raises:
          UserError: if there is no example, or one does not fit into the run's sequences.

        Example:
            >>> import anyexperts_jax as ax
            >>> run = ax.load_run("runs/smoke")
            >>> sums = [ax.Example("nlp", "add", 1, f"{n} + 1?", str(n + 1), "mine") for n in range(3)]
            >>> run.data.encode(sums).valid_BT.sum(axis=1)  # BOS, question, SEP, answer, EOS
            array([10, 10, 10])
        """
        require(len(examples) > 0, "no example is given; a batch has one row or more")
        spec, template = self.config.encoding, chat_template(self.config, self.tokenizer)
        rows = [encode_item(one, spec, tokenizer=self.tokenizer, template=template) for one in examples]
        return stack([padded(row, spec) for row in rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained model with its tokenizer and data, from `load_run` or `train`, on one device or on a mesh.

    It is immutable: methods return their results and change nothing. Attributes: `config`, the `RunConfig`; `model`,
    the Flax module of `run.config.model`; `params`; `router_bias_LC` [L, C], the expert biases; `tokenizer`; `data`, a
    `RunData`; `step`, the step of the checkpoint.

    Example:
        >>> import anyexperts_jax as ax, jax
        >>> run = ax.load_run("runs/smoke")
        >>> output = jax.jit(run.model.apply)({"params": run.params}, run.data.batch("nlp", rows=2))
        >>> output.logits_BTY.shape, run.step  # sequences, positions, vocabulary
        ((2, 128, 260), 3)
    """

    path: pathlib.Path  # its directory
    trained: Trained

    @property
    def config(self) -> RunConfig:
        return self.trained.config

    @functools.cached_property
    def model(self) -> MultimodalModel:
        return MultimodalModel(self.config.model, self.trained.placement)

    @property
    def params(self) -> Any:
        return self.trained.params

    @property
    def router_bias_LC(self) -> jax.Array:
        return self.trained.router_bias_LC

    @property
    def step(self) -> int:
        return self.trained.step

    @property
    def tokenizer(self) -> Tokenizer:
        return self.trained.tokenizer

    @property
    def data(self) -> RunData:
        return RunData(self.config.data, self.tokenizer)

    def evaluate(
        self,
        budgets: Sequence[float] | None = None,
        domains: Sequence[str] | None = None,
        *,
        save: bool = False,
        note: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> EvaluationResult:
        """Measures scores of generated answers, realised budget, load, drops and time, at each budget.

        Args:
          budgets: real experts per token, on average; None: 0.6, 0.8, 1 and 1.2 times that of training.
          domains: names from the run's mixture; None: all.
          save: also write evaluation.json and .csv to the run's directory, where `anyexperts report` reads them.
          note: called with a line when each part is done.
          options: fields of `evaluate.evaluate.Options`: num_examples=64 of each domain's test split,
            calibration_examples=32, batch_size=64, tolerance=0.01, time_rounds=9, calibrated=True,
            model_baselines=False.

        Returns: scores and chance in [0, 1], times in seconds and as ratios, load in slots.

        Raises:
          UserError: if a domain or option is unknown, a budget is out of reach, or the model is dense.
          OSError: with `save`, if there is no disk space for the result.

        Example:
            >>> import anyexperts_jax as ax
            >>> run = ax.load_run("runs/smoke")
            >>> result = run.evaluate([4.8], ["nlp"], num_examples=2, calibrated=False, time_rounds=1)
            >>> 0 <= result.budgets[0].scores[0].score <= 1, result.budgets[0].routing.dropped
            (True, 0)
        """
        for name in options:
            require_one_of("option", name, [field.name for field in dataclasses.fields(Options)])
        measure = functools.partial(
            evaluate_trained, self.trained, budgets, domains, options=Options(**options), note=note
        )
        if not save:
            return measure()
        with run_lock(self.path, "evaluate"):
            result = measure()
            save_evaluation(result, self.path)
        return result

    def generate(
        self,
        question: str | Example,
        *,
        image: Any = None,
        audio: Any = None,
        budget: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Reply:
        """Returns the greedy answer to a question, and the real experts per token of each modality.

        Args:
          question: a text, or an `Example`, whose own answer the model does not see.
          image: a picture for a text: a path, a Pillow image, or pixels [H, W, 3].
          audio: a sound for a text: a path, or mono samples in [-1, 1] at 16 kHz.
          budget: nominal real experts per token; None: the window used in training.
          max_new_tokens: largest number of tokens of the answer, including its end.

        Raises:
          UserError: if the question, picture or sound cannot be read or does not fit into the run's sequences, the
            budget is out of reach, or a budget is given for a dense model.

        Example:
            >>> import anyexperts_jax as ax
            >>> run = ax.load_run("runs/smoke")
            >>> reply = run.generate("2 + 3?", budget=4.8)
            >>> type(reply.answer).__name__, sorted(reply.real_slots), reply.window
            ('str', ['text'], (5.0, 7.0))
        """
        if isinstance(question, Example):
            require(image is None and audio is None, "an Example has its own picture or sound; give it there")
            example = question
        else:
            example = own_example(question, self.config.data.encoding, image=image, audio=audio)
        return ask(self.trained, example, budget, max_new_tokens=max_new_tokens)

    def trace(self, batch: Batch, budget: float | None = None) -> TokenRouting:
        """Returns the routing of every token in every MoE layer: experts, combine weights, slots, importance, drops.

        Args:
          batch: from `run.data.batch` or `run.data.encode`, with any number of rows.
          budget: nominal real experts per token; None: the window used in training.

        Returns: arrays [L, B, T, K] and [L, B, T] on the host: layers, sequences, positions, slots.

        Raises:
          UserError: if the batch does not fit the model, the budget is out of reach, or the model is dense.

        Example:
            >>> import anyexperts_jax as ax
            >>> run = ax.load_run("runs/smoke")
            >>> routing = run.trace(run.data.batch("nlp", rows=2))
            >>> routing.expert_ids_LBTK.shape, len(routing.experts(layer=0, row=0, position=1)) <= 7
            ((1, 2, 128, 7), True)
        """
        return trace_batch(self.trained, batch, budget)


def load_run(path: str | pathlib.Path, mesh: Mesh | None = None, *, which: str = "best") -> Run:
    """Loads a trained run from its directory. The run may still be training: one consistent checkpoint is loaded.

    Args:
      path: the run's directory, as `anyexperts train --run` or `train` wrote it.
      mesh: from `make_mesh`, with any shape, whatever the run was trained on; None: the first device.
      which: "best", the checkpoint with the lowest validation loss, or "last".

    Raises:
      UserError: if there is no run or checkpoint, it is damaged, or the mesh does not divide the model.

    Example:
        >>> import anyexperts_jax as ax
        >>> run = ax.load_run("runs/smoke")
        >>> run.config.model.moe.num_experts, run.data.config.domains[:2]
        (8, ('general', 'nlp'))
    """
    root = pathlib.Path(path)
    return Run(root, load_trained(RunDir(root).root, which, mesh))


def train_run(
    config: RunConfig | str | pathlib.Path,
    run_dir: str | pathlib.Path | None = None,
    *,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    progress: bool = False,
) -> Run:
    """Trains to the last step and loads the best checkpoint on the mesh it was trained on.

    An existing run continues from its last checkpoint, and a finished one is loaded, as with `anyexperts train`.

    Args:
      config: a `RunConfig`, the name of a preset ("tiny", "small", "smoke"), a TOML file, or a run's directory.
      run_dir: None: runs/NAME, where NAME is the preset or file, or runs/custom for a `RunConfig`.
      overrides: "key=value" instead of the preset's or file's value, as in "optim.lr=1e-3".
      plugins: your own modules to import first; the run records them.
      progress: show a bar, lines and tables on standard error.

    Raises:
      UserError: if the configuration is invalid or does not fit the devices, or `run_dir` holds another run.
      RunStoppedError: a loss that is not finite, a full disk, a signal (SIGINT and SIGTERM write a checkpoint first) or
        another process that died: see `train.loop.train`.

    Example:
        >>> import anyexperts_jax as ax
        >>> small = ["model.stack.num_layers=2", "train.steps=3", "train.eval_examples=2"]
        >>> run = ax.train("smoke", "runs/smoke", overrides=[*small, 'data.domains=["general", "nlp"]'])
        >>> run.step
        3
    """
    name = UNNAMED
    if not isinstance(config, RunConfig):
        named = isinstance(config, str | pathlib.Path)
        require(named, f"config is a {type(config).__name__}; it must be a RunConfig, a preset's name or a path")
        name, config = pathlib.Path(config).stem, load_config(config, overrides, plugins)
    else:
        given = bool(overrides or plugins)
        require(not given, "overrides and plugins go with a preset or a file; put them into the RunConfig")
    root = pathlib.Path(run_dir) if run_dir is not None else pathlib.Path("runs") / name
    train(config, root, progress=progress)
    return load_run(root, make_mesh(config.mesh))
