"""The training loop: starts or resumes a run, takes steps, logs, evaluates, writes checkpoints and stops cleanly."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import time
import zlib
from typing import Any

import jax
import numpy as np
from rich.console import Console

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.devices import require_devices
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.bad_rows import BadRows, describe_skipped
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.packing import padding_shares
from anyexperts_jax.data.pipeline import epochs, source_lengths, train_iterator
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import batch_rows, shard_batch
from anyexperts_jax.train import processes
from anyexperts_jax.train.auto_dispatch import auto_choice
from anyexperts_jax.train.begin import first_state
from anyexperts_jax.train.checkpoint import Checkpoints, quiet_orbax
from anyexperts_jax.train.config import RunConfig, describe_differences, to_json
from anyexperts_jax.train.fit import require_fits
from anyexperts_jax.train.goodput import Clock
from anyexperts_jax.train.log_shape import require_complete
from anyexperts_jax.train.metrics import routing_means
from anyexperts_jax.train.profile import Profiler
from anyexperts_jax.train.progress import Reporter, status_line
from anyexperts_jax.train.published import keep_start
from anyexperts_jax.train.recipe import EVERYTHING, Recipe
from anyexperts_jax.train.run_data import restore_iterator, with_fingerprints
from anyexperts_jax.train.run_dir import RunDir, open_run_dir, require_run_of
from anyexperts_jax.train.run_log import NoLog, RunLog, read_records
from anyexperts_jax.train.run_together import AGAIN, describe_last_checkpoint, lock_run, make_watch, waiting
from anyexperts_jax.train.run_tokenizer import pin_tokenizer
from anyexperts_jax.train.runtime import compile_cache
from anyexperts_jax.train.state import TrainState, abstract_state
from anyexperts_jax.train.step import CHECKED_SCALARS, StepReport, jit_train_step, model_apply
from anyexperts_jax.train.stops import (
    DiskFullError,
    NonFiniteError,
    PeerLostError,
    RunInterruptedError,
    StopRequests,
    no_room,
)
from anyexperts_jax.train.trainable import what_trains
from anyexperts_jax.train.validation import Validation, require_validation_examples


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run that reached its last step."""

    run_dir: pathlib.Path
    step: int
    validation: dict[str, Any]  # the last record of kind "validation", see train.metrics
    skipped_steps: int  # steps that were not finite, with train.on_nonfinite="skip"


def train(
    config: RunConfig, run_dir: str | pathlib.Path, *, progress: bool = True, recipe: Recipe = EVERYTHING
) -> TrainResult:
    """Trains to the last step, resuming from the last checkpoint in `run_dir` if there is one.

    A run that is killed and resumed on the same mesh takes the same steps as one that never stopped, bit for bit on a
    CPU. On SIGINT or SIGTERM the run finishes its current step, writes a checkpoint and ends.

    After `train.processes.connect`, every process makes the same call, with a directory that all of them share. The
    batches are those of a single process, and so are the losses except for the order of sums. A run may be resumed with
    another number of processes. A signal to any process ends all of them after the same step. Only the first process
    writes logs and shows progress.

    Args:
      progress: shows a progress bar, lines and tables on the standard error.
      recipe: how the run differs from training every parameter from scratch.

    Raises:
      UserError: if there is no device, the configuration does not fit the devices, or the run in `run_dir` is
        unreadable or has another configuration.
      NonFiniteError: if a loss or the gradient is not finite, with train.on_nonfinite="stop".
      RunInterruptedError: after a signal, once a checkpoint is written.
      DiskFullError: if there is no space for logs or a checkpoint; earlier checkpoints stay intact.
      PeerLostError: if another process died. If one hangs, this process exits; see `processes.Watch`.
    """
    require_devices()
    reporter = Reporter(Console(file=sys.stderr) if progress and processes.is_first() else None)
    paths = RunDir(pathlib.Path(run_dir))
    try:
        own = pin_tokenizer(config.data, config.model, paths.tokenizer, begun=bool(paths.checkpoint_steps()))
        sources = Sources(own)
        config = dataclasses.replace(config, data=with_fingerprints(sources, paths, reporter.note_later))
        mesh = make_mesh(config.mesh)
        require_fits(config, mesh, trains_everything=not recipe.says_what_trains)
        require_validation_examples(config, sources)
        with (
            StopRequests() as requests,
            quiet_orbax(),
            compile_cache(config.runtime.compile_cache),
            lock_run(config, paths),
        ):
            changed = require_run_of(paths, config)
            if changed:
                reporter.note_later(f"continuing with {describe_differences(changed)}")
            return _Run(config, paths, sources, reporter=reporter, requests=requests, recipe=recipe).run()
    except (OSError, ValueError, RuntimeError) as error:
        said, lost = no_room(error), processes.peer_lost(error)
        if said is not None:
            last = describe_last_checkpoint(paths)
            raise DiskFullError(
                f"cannot write to {paths.root}: {said}; {last}; free some space and run it again"
            ) from error
        if lost is not None:
            raise PeerLostError(f"another process died ({lost}); {describe_last_checkpoint(paths)}; {AGAIN}") from error
        raise


class _Run:
    """One process's part of a run: opens everything that the loop uses, and closes it again."""

    def __init__(
        self,
        config: RunConfig,
        paths: RunDir,
        sources: Sources,
        reporter: Reporter,
        requests: StopRequests,
        recipe: Recipe,
    ) -> None:
        self.config, self.paths, self.reporter, self.requests = config, paths, reporter, requests
        self.mesh = make_mesh(config.mesh)
        self.recipe = recipe
        self.clock = Clock()
        self.watch = make_watch(config, paths)
        self.apply = (recipe.apply or model_apply)(config.model, Placement(self.mesh))
        self.trained = what_trains(config)
        self.optimizer = recipe.optimizer or self.trained.optimizer(config)
        self.trainable = recipe.trainable if recipe.says_what_trains else self.trained.trainable
        size = config.train.batch_size
        self.bad_rows, rows = BadRows(config.data.max_bad_share), batch_rows(self.mesh, size)
        reading: dict[str, Any] = {"plugins": config.plugins, "bad_rows": self.bad_rows, "sources": sources}
        self.iterator = train_iterator(config.data, size, rows, **reading, pairs=config.train.loss == "dpo")
        self.lengths = source_lengths(sources)
        self.validation = Validation(config, self.apply, self.mesh, sources, self._waiting)
        self.checkpoints = self._open_checkpoints(read_only=True)
        self.agreement = processes.Agreement()
        self.profiler = Profiler(config.runtime, paths, watches=processes.is_first())
        self.tokens, self.since, self.compiled_in = 0.0, time.perf_counter(), 0.0
        self.first_rows: Batch | None = None  # this process's rows of the first batch

    def run(self) -> TrainResult:
        """Reads and checks everything and compiles the step before it writes: a refused run changes no file."""
        try:
            self._require_same_run()
            state = self._start()
            self.first = int(state.step)
            records = read_records(self.paths.metrics) if self.paths.metrics.exists() else []
            done = self.first == self.config.train.steps
            self._require_validation(records, done)
            self.clock.begin_steps()
            batch = None if done else self._next_batch(None)
            step_fn = None if batch is None else self._compile(state, batch)
            with self.clock.spending("start"):
                self._open_for_writing(self.first)
            try:
                self._steps(state, self.first, batch, step_fn)
            finally:
                self.profiler.close()
                self.reporter.stop()
                self.log.close()
        finally:
            self.bad_rows.close()
            self.iterator.close()  # stops its workers, which would otherwise outlive the run by seconds
            error = sys.exception()
            if error is None or processes.peer_lost(error) is None:  # else closing would wait for the lost process
                with self._waiting("the last checkpoint"):
                    self.checkpoints.close()
        with self._waiting("the end of the logs"):
            processes.wait_for_all("logs closed")
        records = read_records(self.paths.metrics)
        validations = self._require_validation(records, True)
        self.reporter.times(self.clock.report())
        self.reporter.tables(validations[-1])
        skipped = sum(record["kind"] == "nonfinite" for record in records)
        if skipped:
            self.reporter.note(f"{skipped} steps were not finite and skipped")
        return TrainResult(self.paths.root, self.config.train.steps, validations[-1], skipped)

    def _open_checkpoints(self, *, read_only: bool) -> Checkpoints:
        with self._waiting("the other processes to open the checkpoints"):
            return Checkpoints(self.paths.checkpoints, self.config.train.keep_last, read_only=read_only)

    def _require_validation(self, records: list[dict[str, Any]], done: bool) -> list[dict[str, Any]]:
        """Returns the validation records; a finished run must have some, because they are its result."""
        require_complete(records, self.paths.metrics)
        found = [record for record in records if record["kind"] == "validation"]
        missing = done and not found
        require(not missing, f"the run is done, but {self.paths.metrics} has lost its validation records")
        return found

    def _open_for_writing(self, first: int) -> None:
        """Takes over the directory: writes the configuration, opens logs, removes what a killed run left incomplete."""
        if not self.trained.is_everything:
            self.reporter.note_later(self.trained.table())
        self.reporter.show_notes()
        if self.recipe.begin is not None and processes.is_first():
            self.recipe.begin()
        open_run_dir(self.paths.root, self.config, writes=processes.is_first())
        if processes.is_first():
            keep_start(self.config.train.start_from, self.paths)
        self.checkpoints.close()
        self.checkpoints = self._open_checkpoints(read_only=False)
        self.log: RunLog | NoLog = RunLog(self.paths, first) if processes.is_first() else NoLog()
        if not self.trained.is_everything:
            self.log.write("trained", first, self.trained.record())
        if self.first_rows is not None and self.config.data.packing != "none":
            self._report_padding(self.first_rows)

    def _require_same_run(self) -> None:
        numbers = {"the latest checkpoint": self.checkpoints.latest or 0, "the checksum of config.json": 0}
        numbers["the checksum of config.json"] = zlib.crc32(to_json(self.config).encode()) >> 1
        with self._waiting("the other processes"):
            processes.require_agreement(
                f"the processes of {self.paths.root} differ",
                numbers,
                "give all the same command, and a run directory that all of them share",
            )

    def _waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        return waiting(self.watch, what)

    def _start(self) -> TrainState:
        """The state of the last checkpoint, with the data iterator at the same place, or a new state."""
        step, note = self.checkpoints.latest, self.reporter.note_later
        if step is None:
            own = self.config, self.optimizer, self.mesh, self.recipe
            return first_state(*own, waiting=self._waiting, note=note)
        require(
            step <= self.config.train.steps,
            f"the run in {self.paths.root} is at step {step}, past train.steps={self.config.train.steps}",
        )
        abstract = abstract_state(self.config.model, self.optimizer, self.mesh)
        with self._waiting(f"the checkpoint of step {step}"):
            state, data_state = self.checkpoints.restore(step, abstract, self.config)
        restore_iterator(self.iterator, data_state, self.paths.checkpoints / str(step) / "data")
        note(f"resuming from the checkpoint of step {step}")
        return state

    def _steps(self, state: TrainState, first: int, batch: Batch | None, step_fn: Any) -> None:
        """Takes the remaining steps, the first on `batch`. The numbers of a step are read while the next one runs."""
        train = self.config.train
        if step_fn is None:
            self.reporter.note(f"all {train.steps} steps are done")
            return
        self.reporter.start(first, train.steps)
        self.reporter.note(f"step compiled in {self.compiled_in:.1f} s")
        if (choice := auto_choice(self.config, dict(self.mesh.shape))) is not None:
            self.reporter.note(str(choice))
        self.since = time.perf_counter()
        pending = None
        for done in range(first + 1, train.steps + 1):
            batch = batch if done == first + 1 else self._next_batch(pending)
            self.profiler.before(done)
            with self._waiting(f"step {done}"):
                # Asked before the step and read after it, so that the all-reduce overlaps with the step.
                asked = self.agreement.ask(self.requests.signal_number or 0, self.profiler.asked())
                state, report = step_fn(state, batch)
            if pending is not None:
                self._read(*pending)
            pending = (done, report)
            with self._waiting(f"step {done}"):
                signal_number, profile = self.agreement.read(asked)
            if profile:
                self.profiler.request()
            evaluates = done % train.eval_every == 0 or done == train.steps
            interrupted = signal_number > 0 and done < train.steps
            saves = evaluates or interrupted or done % train.checkpoint_every == 0
            if saves or self.profiler.ends_with(done):
                self._read(*pending)
                pending = None
            if self.profiler.ends_with(done):
                self.profiler.close()
            if saves:
                self._save(done, state, evaluates)
            if interrupted:
                self._interrupt(done, signal_number)
        with self.clock.spending("checkpoint"):
            self._finish_checkpoint()

    def _next_batch(self, pending: tuple[int, StepReport] | None) -> Batch:
        """The next batch on the mesh. The wait counts as lost time only if the device was idle meanwhile."""
        start = time.perf_counter()
        rows = next(self.iterator)
        if self.first_rows is None:
            self.first_rows = rows
        batch = shard_batch(self.mesh, rows, self.config.train.batch_size)
        finite: Any = None if pending is None else pending[1].finite
        if finite is None or finite.is_ready():
            self.clock.add("data", time.perf_counter() - start)
        return batch

    def _report_padding(self, first: Batch) -> None:
        """Reports, once per process, the share of padding in its first batch with and without packing."""
        alone, packed = padding_shares(first, segments=2 if self.config.train.loss == "dpo" else 1)
        self.log.write("data", self.first, {"padding_share": packed, "padding_share_unpacked": alone})
        length = first.tokens_BT.shape[1]
        self.reporter.note(
            f"packing: {packed:.1%} of the positions are padding; with one example per row of {length} it would be "
            f"{alone:.1%}"
        )

    def _tell_data(self, step: int) -> None:
        """Reports how often this process read each of the user's sources, and what it skipped."""
        if not self.config.data.folders:
            return
        skipped = self.bad_rows.counts()
        passes = epochs(self.config.data, self.lengths, self.config.train.batch_size, self.iterator.get_state())
        self.log.write("sources", step, {"epochs": passes, "skipped_rows": skipped})
        for line in describe_skipped(skipped):
            self.reporter.note(line)

    def _finish_checkpoint(self) -> None:
        with self._waiting("the last checkpoint"):
            self.checkpoints.wait()

    def _interrupt(self, step: int, signal_number: int) -> None:
        self._finish_checkpoint()
        name = signal.Signals(signal_number).name
        last = describe_last_checkpoint(self.paths)
        message = f"stopped by {name} after step {step} of {self.config.train.steps}; {last}"
        raise RunInterruptedError(f"{message}; {AGAIN}", signal_number)

    def _compile(self, state: TrainState, batch: Batch) -> Any:
        start = time.perf_counter()
        with self.clock.spending("compile"):
            step_fn = jit_train_step(self.config, self.optimizer, self.apply, self.mesh, self.trainable)
            compiled = step_fn.lower(state, batch).compile()
        self.compiled_in = time.perf_counter() - start
        return compiled

    def _read(self, step: int, report: StepReport) -> None:
        """Checks, logs and shows one step's report."""
        with self._waiting(f"step {step}"):
            report = jax.device_get(report)
        self.clock.step_done()
        if not report.finite:
            self._not_finite(step, report)
        self.tokens += float(report.routing.tokens_M.sum())
        train = self.config.train
        if step % train.log_every and step != train.steps:
            return
        rate = self.tokens / (time.perf_counter() - self.since)
        means = routing_means(self.config.model.moe, report.routing)
        scalars = {name: float(value) for name, value in report.scalars.items()}
        times = {"tokens_per_second": rate, **self.clock.report().record()}
        window = self.clock.window()
        if window is not None:
            times["step_seconds"] = dataclasses.asdict(window)
        self.log.write("train", step, {**scalars, **means, **times})
        self.reporter.step(step, train.steps, status_line(scalars, means, rate))
        self.tokens, self.since = 0.0, time.perf_counter()

    def _not_finite(self, step: int, report: StepReport) -> None:
        name = next(name for name in CHECKED_SCALARS if not np.isfinite(report.scalars[name]))
        value = float(report.scalars[name])
        self.log.write("nonfinite", step, {"metric": name, "value": str(value)})
        if self.config.train.on_nonfinite == "stop":
            self._finish_checkpoint()
            raise NonFiniteError(
                f"step {step}: {name} is {value}; {describe_last_checkpoint(self.paths)}; "
                "lower optim.lr, or set train.on_nonfinite=skip to skip such steps"
            )
        self.reporter.note(f"step {step} skipped: {name} is {value}")

    def _save(self, step: int, state: TrainState, evaluates: bool) -> None:
        """Evaluates if it is due and writes a checkpoint. This time does not count as training."""
        start = time.perf_counter()
        loss = math.inf
        if evaluates:
            with self.clock.spending("validation"):
                record = self.validation(state)
                if self.recipe.measure is not None:
                    record |= self.recipe.measure(state, self.validation)
            loss = record["loss"] if np.isfinite(record["loss"]) else math.inf
            self.log.write("validation", step, record)
            self.reporter.evaluation(step, record)
            self._tell_data(step)
        with self.clock.spending("checkpoint"), self._waiting(f"the checkpoint of step {step}"):
            self.checkpoints.save(state, self.iterator.get_state(), self.config, loss)
        self.since += time.perf_counter() - start
