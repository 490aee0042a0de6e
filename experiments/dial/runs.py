"""Makes one training with its measurements, or reads its result if it was made before."""

import dataclasses
import json
import pathlib
import shutil
import time
from typing import Any, NamedTuple

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.pretrained.load import load_pretrained
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.train.config import RunConfig, load_config
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.published import load_tuned
from anyexperts_jax.train.run_dir import RunDir, write_whole
from experiments.dial.measure import Point, bench_of, dense_point, measure_kind, point_at
from experiments.dial.plan import KINDS, STATIC, Plan, digest
from experiments.dial.starts import Note, start_of

DOMAIN = "text"
DENSE, UNTRAINED = "dense", "untrained"
_ROUTING = ("**/router/**",)  # what trains: the parameters that split and attach added
_SLOTS = (*_ROUTING, "**/importance/**", "**/strength")
_MOST_STEPS = 100  # between checkpoints


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A training and its measurements."""

    kind: str  # an entry of KINDS; "dense": the model before the split; "untrained": the split before training
    seed: int
    id: str
    points: tuple[Point, ...]
    loss: float | None = None  # of validation at the end of training, with all experts, nats per token
    train_seconds: float | None = None  # on the machine as it was, compilation included


def config_of(plan: Plan, name: str, seed: int, start: pathlib.Path) -> RunConfig:
    """Returns the configuration of a training.

    Raises:
      UserError: if an override does not fit.
    """
    kind = KINDS[name]
    every = next(steps for steps in range(min(plan.steps, _MOST_STEPS), 0, -1) if plan.steps % steps == 0)
    own = [
        f'data.domains=["{DOMAIN}"]',
        f"data.folders={json.dumps([f'{DOMAIN}={plan.train}'])}",
        f"data.encoding.max_length={plan.length}",
        f"data.seed={seed}",
        "seed=0",  # so that all seeds share a compiled program: they differ in data, start and nothing else
        f"optim.lr={plan.lr}",
        f"optim.warmup_steps={min(plan.steps // 8, 50)}",
        f"train.steps={plan.steps}",
        f"train.batch_size={plan.batch_size}",
        f"train.checkpoint_every={every}",
        f"train.eval_every={plan.steps}",
        f"train.eval_examples={plan.batch_size}",
        "train.log_every=1",
        "train.keep_last=1",
        f"train.trainable={json.dumps(_SLOTS if kind.slots else _ROUTING)}",
        f"train.budgets={json.dumps(plan.budgets)}",
        "train.distillation=1.0",
    ]
    if kind.slots:
        own.append(f'train.learning_rates=["**/importance/**={plan.importance_lr}"]')
    return load_config(start, (*own, *kind.set, *plan.set))


class Place(NamedTuple):
    """Where a training and its result are."""

    config: RunConfig
    id: str
    folder: pathlib.Path


def place_of(plan: Plan, name: str, seed: int, note: Note) -> Place:
    """Returns the place of a training; makes its start if it is missing."""
    config = config_of(plan, name, seed, start_of(plan, KINDS[name], seed, note))
    own = digest(config=dataclasses.asdict(config), kind=name, **_measured(plan))
    return Place(config, own, plan.run / "runs" / f"{name}-{seed}-{own}")


def outcome_of(plan: Plan, name: str, seed: int, note: Note) -> Outcome:
    """Trains and measures one kind with one seed, or returns the result of an earlier call with the same options.

    An interrupted training is resumed. The checkpoint of the first seed is kept, to measure seconds.

    Raises:
      UserError: as for a training.
      RunInterruptedError: after SIGINT or SIGTERM.
    """
    place = place_of(plan, name, seed, note)
    known, trained = place.folder / "result.json", place.folder / "train"
    kept = seed == plan.seeds[0]
    if known.exists() and (RunDir(trained).checkpoint_steps() or not kept):
        note(f"{name}, seed {seed}: done before, in {place.folder}")
        return read_outcome(known)
    note(f"{name}, seed {seed}: training in {place.folder}")
    began = time.perf_counter()
    record = train(place.config, trained).validation
    seconds = time.perf_counter() - began
    points = measure_kind(plan, name, load_tuned(trained, "last"), note)
    found = Outcome(name, seed, place.id, points, loss=float(record["loss"]), train_seconds=round(seconds, 1))
    write_whole(known, json.dumps(dataclasses.asdict(found)) + "\n")
    if not kept:
        shutil.rmtree(trained)
    return found


def references(plan: Plan, note: Note) -> tuple[Outcome, ...]:
    """Measures the model before the split, and the split before training at each budget."""
    start = start_of(plan, KINDS[STATIC], plan.seeds[0], note)
    own = digest(start=start.name, **_measured(plan))
    found = []
    for kind in (DENSE, UNTRAINED):
        path = plan.run / "runs" / f"{kind}-{own}.json"
        if path.exists():
            note(f"{kind}: done before")
            found.append(read_outcome(path))
            continue
        note(f"measuring the {kind} model")
        bench = bench_of(plan, load_pretrained(plan.model if kind == DENSE else start))
        if kind == DENSE:
            points: tuple[Point, ...] = (dense_point(DENSE, bench),)
        else:
            points = tuple(point_at(bench, STATIC, budget) for budget in plan.budgets)
        found.append(Outcome(kind, 0, own, points))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(found[-1])) + "\n")
    return tuple(found)


def kept_outcome(plan: Plan, name: str, note: Note) -> tuple[Outcome, Pretrained]:
    """Returns the result and the checkpoint of the first seed.

    Raises:
      UserError: if it was not trained yet.
    """
    folder = place_of(plan, name, plan.seeds[0], note).folder
    done = (folder / "result.json").exists() and bool(RunDir(folder / "train").checkpoint_steps())
    require(done, f"{folder} holds no finished training; run the same command without --times first")
    return read_outcome(folder / "result.json"), load_tuned(folder / "train", "last")


def read_outcome(path: pathlib.Path) -> Outcome:
    """Reads a result.json.

    Raises:
      UserError: if it cannot be read.
    """
    return outcome_from(parse_json_object(read_text(path, "result"), str(path)))


def outcome_from(values: dict[str, Any]) -> Outcome:
    """Inverts `dataclasses.asdict`."""
    return Outcome(**{**values, "points": tuple(Point(**point) for point in values["points"])})


def _measured(plan: Plan) -> dict[str, Any]:
    """Returns what measurements depend on beside a checkpoint."""
    return {"sources": plan.sources, "test_tokens": plan.test_tokens, "length": plan.length, "budgets": plan.budgets}
