"""`anyexperts bench step`: a whole train step compared with transformers', at a size that a CPU trains in minutes.

    anyexperts bench step --out experiments/results

The model is text only and has the structure and sizes of Qwen3MoE. A step is forward, backward, clipping and AdamW on
the same tokens, with a loss at every position and matmuls in the size's dtype. Our parameters are float32; those of
transformers have that dtype too.
"""

import dataclasses
import gc
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.bench.cases import temporary_mib
from anyexperts_jax.bench.output import environment, markdown, write_files
from anyexperts_jax.bench.peers import PEER, has_transformers, transformers_step
from anyexperts_jax.bench.stopwatch import interleaved_rounds
from anyexperts_jax.core.batch import Batch, make_batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.encode import EncodingSpec
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import init_params, logical_axes
from anyexperts_jax.nn.config import AttentionConfig, Dtype, StackConfig
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.optim import make_optimizer
from anyexperts_jax.train.state import TrainState, init_state
from anyexperts_jax.train.step import make_train_step, model_apply

States = dict[str, TrainState]


@dataclasses.dataclass(frozen=True)
class StepSize:
    """The model and batch of the benchmark."""

    width: int = 256
    hidden: int = 256
    layers: int = 6
    experts: int = 32
    slots: int = 8
    heads: int = 8
    vocabulary: int = 1024
    batch: int = 8
    length: int = 256
    dtype: Dtype = "float32"
    scan_unroll: int = 6


SIZES = {
    "40M": StepSize(),
    "800M": StepSize(
        width=1024,
        hidden=512,
        layers=8,
        experts=64,
        heads=16,
        vocabulary=8192,
        batch=8,
        length=1024,
        dtype="bfloat16",
        scan_unroll=8,
    ),
}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """One row. `ratio` is tokens per second relative to transformers in the same round; None if that did not run."""

    form: str
    parameters: int
    milliseconds: float
    tokens_per_second: float
    ratio: float | None
    temporary_mib: float | None
    others_load: float | None  # cores kept busy by other processes


@dataclasses.dataclass(frozen=True)
class StepBench:
    """The table of one run, and the environment that produced it."""

    environment: dict[str, Any]
    steps: tuple[StepTime, ...]


def step_forms(size: StepSize) -> dict[str, RunConfig]:
    """Our forms: plain top-k in two dispatches, and AnyExperts at the paper's highest and lowest budget, scaled to
    `slots`."""
    static = AnyExpertsConfig.static_top_k(size.experts, size.slots)
    paper = AnyExpertsConfig(
        num_experts=size.experts, num_virtual=size.experts // 4, k_min=size.slots, k_max=size.slots + 4
    )
    low = dataclasses.replace(paper, k_min=size.slots - 4, k_max=size.slots)
    return {
        f"top-{size.slots}, blocks": run_config(size, static, "blocks"),
        f"top-{size.slots}, capacity 1.25": run_config(size, static, "capacity"),
        f"AnyExperts {paper.expected_real_slots:g}, blocks": run_config(size, paper, "blocks"),
        f"AnyExperts {low.expected_real_slots:g}, blocks": run_config(size, low, "blocks"),
    }


def run_config(size: StepSize, moe: AnyExpertsConfig, dispatch: str) -> RunConfig:
    stack = StackConfig(
        d_model=size.width,
        num_layers=size.layers,
        num_dense_layers=0,
        expert_d_ff=size.hidden,
        num_shared_experts=0,
        attention=AttentionConfig(
            num_heads=size.heads, num_kv_heads=size.heads, head_dim=size.width // size.heads, qk_norm=True
        ),
        execution=Execution(dispatch=dispatch),
        dtype=size.dtype,
        scan_unroll=size.scan_unroll,
    )
    model = ModelConfig(
        vocab_size=size.vocabulary, max_length=size.length, stack=stack, moe=moe, vision=None, audio=None
    )
    encoding = EncodingSpec(max_length=size.length, max_patches=0, max_frames=0)
    return RunConfig(model=model, data=DataConfig(domains=("nlp",), encoding=encoding))


def bench_step(
    size: str | StepSize = "40M",
    rounds: int = 7,
    patience: float = 0.0,
    note: Callable[[str], None] = lambda line: None,
) -> StepBench:
    """Times the steps of all forms, interleaved, on the same random tokens.

    Args:
      patience: seconds to wait until the machine is otherwise idle.
      note: called with a line of progress.

    Raises:
      UserError: for an unknown size, or rounds < 1.
    """
    require(rounds >= 1, f"rounds={rounds} must be >= 1")
    if isinstance(size, str):
        require_one_of("size", size, SIZES)
        size = SIZES[size]
    made_with = environment(rounds) | {"size": dataclasses.asdict(size)}
    tokens_BT = np.random.default_rng(0).integers(0, size.vocabulary, (size.batch, size.length), np.int32)
    calls: dict[str, Callable[[], Any]] = {}
    parameters: dict[str, int] = {}
    temporary: dict[str, float] = {}
    if has_transformers():
        note(PEER)
        calls[PEER], parameters[PEER] = transformers_step(size, tokens_BT)
    states: States = {}
    for form, config in step_forms(size).items():
        note(form)
        calls[form], parameters[form], temporary[form] = own_step(config, tokens_BT, states)
    gc.collect()
    note("timing")
    found = interleaved_rounds(calls, rounds, patience)
    steps = (
        StepTime(
            form=form,
            parameters=parameters[form],
            milliseconds=found.milliseconds(form),
            tokens_per_second=1e3 * tokens_BT.size / found.milliseconds(form),
            ratio=1 / found.ratio(form, PEER) if PEER in calls else None,
            temporary_mib=temporary.get(form),
            others_load=found.others_load,
        )
        for form in calls
    )
    return StepBench(made_with, tuple(steps))


def own_step(config: RunConfig, tokens_BT: np.ndarray, states: States) -> tuple[Callable[[], Any], int, float]:
    """(a call that takes one train step, number of parameters, MiB besides state and batch).

    Args:
      states: the train states, by the shapes of their arrays. Forms with equal shapes share one state, because at the
        larger size one state per form would not fit a GPU.
    """
    optimizer = make_optimizer(config.optim, logical_axes(config.model))

    def start(key: jax.Array) -> TrainState:
        return init_state(config.model, optimizer, init_params(config.model, key))

    abstract = jax.eval_shape(start, jax.random.key(0))
    shapes = str(jax.tree.leaves_with_path(abstract))
    if shapes not in states:
        states[shapes] = start(jax.random.key(0))
    batch = text_batch(tokens_BT)
    train_step = make_train_step(config, optimizer, model_apply(config.model))
    program = jax.jit(train_step, donate_argnums=0).lower(abstract, batch).compile()

    def step() -> Any:
        states[shapes], report = program(states[shapes], batch)
        return report

    count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    return step, count, temporary_mib(program)


def text_batch(tokens_BT: np.ndarray) -> Batch:
    """A batch of text without padding, in which every position predicts the next token."""
    loss_mask_BT = np.ones(tokens_BT.shape, bool)
    loss_mask_BT[:, -1] = False
    return jax.tree.map(jnp.asarray, make_batch(tokens_BT, loss_mask_BT=loss_mask_BT))


def step_table(bench: StepBench) -> TextTable:
    rows = [
        (
            one.form,
            f"{one.parameters:,}",
            f"{one.milliseconds:.0f}",
            f"{one.tokens_per_second:.0f}",
            "-" if one.ratio is None else f"{one.ratio:.2f}",
            "-" if one.temporary_mib is None else f"{one.temporary_mib:.0f}",
            "-" if one.others_load is None else f"{one.others_load:.1f}",
        )
        for one in bench.steps
    ]
    columns = ("form", "parameters", "ms", "tokens/s", "tokens/s over transformers", "temporaries MiB", "others' load")
    return TextTable(bench.environment["size"]["dtype"], columns, tuple(rows))


def write_bench(bench: StepBench, folder: pathlib.Path, command: str) -> tuple[pathlib.Path, ...]:
    """Writes bench_step.json, .csv and .md to `folder` and returns their paths."""
    text = markdown("One train step", command, bench.environment, [step_table(bench)])
    return write_files(folder, "bench_step", command, bench=bench, rows=bench.steps, text=text)
