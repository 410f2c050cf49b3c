"""The one training loop, for both stages.

step_fn(state, batch) -> (state, metrics), jitted, state donated; batches put ahead of use; metrics fetched one
step late, so that the host never waits for the device between logs. Before anything that is kept (an evaluation, a
checkpoint) it looks at all steps up to there: what is on disk is a function of the steps, wherever a run was killed.
A step is saved before it is evaluated: an evaluation may be interrupted, and then the next start makes it.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax
import numpy as np
import optax

from dit_jax.checkpoint import SNAPSHOTS, Checkpoints, write_config
from dit_jax.checkpoint.agreement import agree
from dit_jax.config import Config, undivided_activations
from dit_jax.data.bad_examples import BadExamples
from dit_jax.metrics.held_out import means
from dit_jax.models.autoencoder import FROZEN_WITH_ENCODER
from dit_jax.models.averages import average_decays, initial_share_note, length_name
from dit_jax.parallel.mesh import check_batch_size, prefetch, to_host, traced_on
from dit_jax.parallel.preemption import RESTART, MakeWay, Preemption, heed
from dit_jax.training.bad_steps import BadSteps
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.reporting import Reporter
from dit_jax.training.state import TrainState, abstract_state, create_state
from dit_jax.training.step import Constants, GradientFn, ObserveFn, jit_train_step, make_eval_step, make_train_step
from dit_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage brings to the loop.

    gradient_fn, eval_fn, observe, constants: see `training.step`; train_batches(start_step), eval_batches(): this
    process's rows, as NumPy; draw(params): pictures by name, uint8 [H, W, 3]; measure(params): further held-out
    figures; initial_params(abstract): what a new run starts with, None for random ones; initial_notes: lines on these;
    bad_examples: what the batches take note of, of the training data first.
    """

    gradient_fn: GradientFn
    eval_fn: Callable[[Params, Batch, Constants], dict[str, Array]]
    train_batches: Callable[[int], Iterable[dict[str, np.ndarray]]]
    eval_batches: Callable[[], Iterable[dict[str, np.ndarray]]]
    draw: Callable[[Params], dict[str, np.ndarray]]
    measure: Callable[[Params], dict[str, float]] | None = None
    observe: ObserveFn | None = None
    constants: Constants = None
    initial_params: Callable[[Params], Params] | None = None
    initial_notes: Sequence[str] = ()
    examples_of: Callable[[int], list[int]] | None = None
    bad_examples: Sequence[BadExamples] = ()


def train(
    config: Config,
    workdir: str,
    task: Task,
    mesh: jax.sharding.Mesh,
    started: float | None = None,
    preemption: Preemption | None = None,
    compiled: Callable[..., Callable] = lambda step_fn, *_: step_fn,
) -> TrainState:
    """Trains to the config's last step, from the newest checkpoint of `workdir` if there is one; returns the state.

    Args:
      started: `time.monotonic()` at the start of the program, to tell how long the first step took; None: now.
      preemption: may ask the run to make way, None: nothing does. It then saves, and MakeWay is raised.
      compiled: (jitted step, abstract state, constants) -> the step as it is called, `KeptStep.compiled` for example.
    """
    training, started = config.training, time.monotonic() if started is None else started
    check_batch_size(training.global_batch_size, mesh, "config.training.global_batch_size")
    optimizer, train_step = build_update(config, task.gradient_fn, task.observe)
    abstract = abstract_state(config, optimizer, mesh)
    step_fn, first = compiled(jit_train_step(train_step, abstract), abstract, task.constants), FirstStep(started)
    active = jax.process_index() == 0
    if active:
        write_config(workdir, config)
    while True:  # again after a return to a checkpoint, as if the program had been started again
        lines = undivided_activations(config, mesh.shape)
        checkpoints = open_checkpoints(workdir, config, lines.append)
        found = checkpoints.restore_newest_good(state_items(abstract))
        start_step, items = found or (0, {})
        if found:
            state = restored_state(start_step, items, abstract, config, optimizer, mesh)
            lines.append(f"resuming from the checkpoint of step {start_step} of {training.num_train_steps}")
        else:
            params = task.initial_params(abstract.params) if task.initial_params else None
            state = create_state(config, optimizer, mesh, params)
            lines += task.initial_notes
        bad_steps = BadSteps(workdir, start_step, config.seed, task.examples_of, active, lines.append)
        with (
            Reporter(workdir, training.num_train_steps, start_step, active=active) as reporter,
            checkpoints,
            open_snapshots(workdir, config, reporter.log) as snapshots,
        ):
            checkpoints.log = bad_steps.log = reporter.log
            for line in lines:
                reporter.log(line)
            if snapshots:
                _resume_snapshots(snapshots, state, start_step, config)
            run = _Run(
                config,
                task,
                mesh,
                step_fn,
                state,
                start_step,
                checkpoints,
                snapshots,
                bad_steps,
                reporter,
                first,
                preemption or Preemption(),
            )
            if (state := run()) is not None:
                return state
            checkpoints.settle()
            target = bad_steps.rollback_target(checkpoints.all_steps(), training.max_rollbacks)
            target, items = checkpoints.restore_newest_good(state_items(abstract), before=target + 1)
            bad_steps.add_rollback(target)
            state = restored_state(target, items, abstract, config, optimizer, mesh)
            checkpoints.save(bad_steps.row[-1], state_items(state), config)
            reporter.log(f"going on behind step {bad_steps.row[-1]} with the state of step {target}")


def build_update(
    config: Config, gradient_fn: GradientFn, observe: ObserveFn | None
) -> tuple[optax.GradientTransformation, Callable]:
    """Returns a config's optimizer and its update, not yet jitted (`training.step`)."""
    training = config.training
    frozen = FROZEN_WITH_ENCODER if config.autoencoder and config.autoencoder.frozen_encoder else ()
    optimizer = make_optimizer(config.optimizer, training.num_train_steps, frozen)
    decays = average_decays(training)
    train_step = make_train_step(
        gradient_fn, optimizer, training.ema_decay, config.seed, decays, observe, training.spike_zscore
    )
    return optimizer, train_step


class _Run:
    """One start of a run, from its checkpoint or its beginning on."""

    def __init__(
        self,
        config,
        task,
        mesh,
        step_fn,
        state,
        start_step,
        checkpoints,
        snapshots,
        bad_steps,
        reporter,
        first,
        preemption,
    ):
        self.config, self.task, self.mesh, self.step_fn = config, task, mesh, step_fn
        self.state, self.step, self.saved_step = state, start_step, start_step  # step: made, or under way
        self.checkpoints, self.snapshots, self.bad_steps = checkpoints, snapshots, bad_steps
        self.reporter, self.first, self.preemption = reporter, first, preemption
        self.eval_step = jax.jit(traced_on(mesh, make_eval_step(task.eval_fn)))
        self.window, self.told_of_average = MetricsWindow(start_step), False

    def __call__(self) -> TrainState | None:
        """Returns the state after the last step; None after too many bad steps in a row.

        Raises:
          MakeWay: where the run is asked to make way; its steps are saved.
        """
        try:
            if self._evaluation_is_due():
                self._evaluate()
            return self._steps()
        except MakeWay:
            self._make_way()
            raise

    def _steps(self) -> TrainState | None:
        training, config = self.config.training, self.config
        batches = prefetch(self.task.train_batches(self.step), self.mesh, training.global_batch_size)
        for step in range(self.step + 1, training.num_train_steps + 1):
            with self.window.waiting_for_data(), self.preemption.interruptible():
                batch = next(batches)
            tell_bad_examples(self.task.bad_examples, self.reporter)
            with self.first.compiling():
                self.state, metrics = self.step_fn(self.state, batch, self.task.constants)
            self.step = step
            self.first.report(metrics, self.reporter)
            self.window.add(metrics)
            is_last, stops = step == training.num_train_steps, self.preemption.stops_after(step)
            saves = is_last or step % training.checkpoint_every_steps == 0
            snaps = self.snapshots and (is_last or step % training.snapshot_every_steps == 0)
            evaluates = self._is_evaluated(step)
            if evaluates or saves or snaps or stops:
                good = self._look(keep=0)
            elif (step - 1) % training.log_every_steps == 0:  # one step late: the device works on this step meanwhile
                good = self._look(keep=1)
            else:
                good = True
            if not good:
                batches.close()
                return None
            self.reporter.progress(self.window.finished_step(), self.window.last_loss)
            # In a row of bad steps never so many that the checkpoint before it goes: its end may be to return there.
            in_row = [bad for bad in self.bad_steps.row if bad % training.checkpoint_every_steps == 0]
            if stops or is_last or (saves and len(in_row) < training.max_checkpoints):
                self._save()
            if snaps:
                self.snapshots.save(step, _snapshot(self.state, config), config)
            if stops:
                raise MakeWay(self.preemption.code)
            if evaluates:
                self._evaluate()
        self.checkpoints.wait()
        return self.state

    def _look(self, keep: int) -> bool:
        """Takes the metrics of all steps but the newest `keep`; returns False after too many bad steps in a row."""
        training, rows = self.config.training, self.window.fetch(keep)
        for row_step, row in rows:
            if reason := self.bad_steps.add(row_step, row):
                self.reporter.log(f"step {row_step} was skipped, {reason}: {len(self.bad_steps.row)} in a row")
            if len(self.bad_steps.row) >= training.max_bad_steps:
                return False
        if rows:
            rates, bad = self.window.rates(), count_bad_examples(self.task.bad_examples)
            for _, group in itertools.groupby(rows, lambda row: (row[0] - 1) // training.log_every_steps):
                line = list(group)
                self.reporter.scalars(line[-1][0], "train", summary(line) | rates | bad)
        return True

    def _save(self) -> None:
        self.bad_steps.write_left()
        self.checkpoints.save(self.step, state_items(self.state), self.config)
        self.saved_step = self.step

    def _is_evaluated(self, step: int) -> bool:
        training = self.config.training
        return step == training.num_train_steps or step % training.eval_every_steps == 0

    def _evaluation_is_due(self) -> bool:
        """Returns whether this start begins with the evaluation of its step, before which the last start ended."""
        due = self.step > 0 and self._is_evaluated(self.step) and not self.bad_steps.follows_return
        return due and agree("evaluated", str(self.reporter.has_evaluated(self.step)))[0] == "False"

    def _evaluate(self) -> None:
        """Evaluates the state and draws with it; both may be interrupted, and the step was saved before.

        Its line of the curves is written last: where it is missing, a later start evaluates again.
        """
        task, step = self.task, self.step
        params = self.state.eval_params
        if (note := initial_share_note(self.config.training, step)) and not self.told_of_average:
            self.reporter.log(f"step {step}: {note}")
            self.told_of_average = True
        with self.preemption.interruptible(self._finish_saves):
            eval_batches = prefetch(task.eval_batches(), self.mesh, self.config.training.global_batch_size)
            values = evaluate(self.eval_step, params, eval_batches, task.constants)
            tell_bad_examples(task.bad_examples, self.reporter)
            values |= task.measure(params) if task.measure else {}
            pictures = task.draw(params)
        for name, picture in pictures.items():
            self.reporter.image(step, name, picture)
        if self.saved_step == step:
            self.checkpoints.add_metrics(step, values)
        self.reporter.scalars(step, "eval", values)
        self.reporter.log(f"step {step}: held-out " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        self.window.restart_clock()

    def _make_way(self) -> None:
        """Saves the steps that no checkpoint has yet, and says where the next start goes on."""
        if self.saved_step != self.step and self._look(keep=0):
            self._save()
        self._finish_saves()

    def _finish_saves(self) -> None:
        """Waits for the save; a thread may call it while the main thread hangs in an evaluation."""
        if self.saved_step != self.step and jax.process_count() == 1:  # of several, all would have to take part
            self._save()
        self.checkpoints.settle()  # had it failed, the log says so, and the next start goes on from the one before
        if self.preemption.code == RESTART:
            self.reporter.log(
                f"asked to make way after step {self.step}; the exit code {RESTART} says to start this run again"
            )
        else:
            self.reporter.log(f"interrupted after step {self.step}; start this run again to go on behind it")


def open_checkpoints(workdir: str, config: Config, log: Callable[[str], None]) -> Checkpoints:
    """Returns the store of a run's checkpoints."""
    training = config.training
    best = training.keep_best_metric and (training.keep_best_metric, training.keep_best_mode)
    return Checkpoints(
        workdir, training.max_checkpoints, keep_every=training.keep_every_steps, keep_best=best or None, log=log
    )


def open_snapshots(
    workdir: str, config: Config, log: Callable[[str], None]
) -> AbstractContextManager[Checkpoints | None]:
    """Returns the store of the power-function averages' snapshots, all of them kept; of None where there are none."""
    return Checkpoints(workdir, folder=SNAPSHOTS, log=log) if config.training.ema_lengths else nullcontext()


def _snapshot(state: TrainState, config: Config) -> dict:
    names = [length_name(length) for length in config.training.ema_lengths]
    return {name: state.averages[name] for name in names}


def _resume_snapshots(snapshots: Checkpoints, state: TrainState, step: int, config: Config) -> None:
    """Drops the snapshots after a step, which come again, and makes that of the step where a kill came before it."""
    snapshots.drop_after(step)
    if step and step % config.training.snapshot_every_steps == 0 and step not in snapshots.all_steps():
        snapshots.save(step, _snapshot(state, config), config)


def state_items(state: TrainState) -> dict:
    """Returns the items of a checkpoint; the step is the checkpoint's name."""
    items = {"params": state.params, "opt_state": state.opt_state, "ema_params": state.ema_params}
    items |= {"averages": state.averages or None, "loss_state": state.loss_state, "recent": state.recent}
    return {name: tree for name, tree in items.items() if tree is not None}


def restored_state(
    step: int,
    items: dict,
    abstract: TrainState,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Returns the state of a checkpoint's items (`state_items`), each shard where `abstract` has it.

    Converted weights come without the optimizer's, the averages' and the loss' state: those start anew.
    """
    counter = jax.device_put(np.int32(step), abstract.step.sharding)
    if set(items) == set(state_items(abstract)):
        return abstract.replace(step=counter, **items)
    return create_state(config, optimizer, mesh, items["params"]).replace(step=counter, **items)


def evaluate(
    eval_step: Callable, params: Params, batches: Iterator[Batch], constants: Constants = None
) -> dict[str, float]:
    """Returns the means over all real examples of `batches` (`metrics.held_out.means`)."""
    found = []
    for batch in batches:
        found.append(eval_step(params, batch, constants))
        heed()
    return means(jax.tree.map(to_host, found))[0]


def tell_bad_examples(data_sets: Sequence[BadExamples], reporter: Reporter) -> None:
    """Logs what was found bad since the last call; another process than the first tells it to its own terminal."""
    for line in (line for data_set in data_sets for line in data_set.news()):
        if jax.process_index():
            print(f"process {jax.process_index()}: {line}", file=sys.stderr, flush=True)
        else:
            reporter.log(line)


def count_bad_examples(data_sets: Sequence[BadExamples]) -> dict[str, float]:
    """Returns `bad_examples`, how many this process has met since its start; nothing where it has met none."""
    count = sum(map(len, data_sets))
    return {"bad_examples": float(count)} if count else {}


class FirstStep:
    """Tells how long a start of a run took to its first step, and how much of it that step's compilation."""

    def __init__(self, started: float):
        self._started = started
        self._compile_seconds: float | None = None
        self._reported = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Times the first call within: it returns when the step is traced and compiled, and only then runs."""
        start = time.monotonic()
        yield
        if self._compile_seconds is None:
            self._compile_seconds = time.monotonic() - start

    def report(self, metrics: dict[str, Array], reporter: Reporter) -> None:
        """Waits for the first step and logs it; of the others nothing is waited for."""
        if self._reported:
            return
        self._reported, begun = True, time.monotonic() - self._started
        jax.block_until_ready(metrics)
        reporter.log(
            f"first step begun after {begun:.2f} s, for {self._compile_seconds:.2f} s of which it was awaited from the "
            f"compiler, and done after {time.monotonic() - self._started:.2f} s"
        )


class MetricsWindow:
    """Metrics on the device since the last fetch, and the clock of the rates."""

    def __init__(self, start_step: int):
        self._step = start_step  # of the last fetched metrics
        self._pending: list[dict[str, Array]] = []
        self._num_ready = 0  # of the pending ones, from the first
        self.last_loss: float | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the next rates what was not training."""
        self._start, self._counted, self._waited = time.monotonic(), 0, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time within as waiting for data, if the devices ran out of steps to make meanwhile."""
        start = time.monotonic()
        yield
        if not self._pending or self._pending[-1]["loss"].is_ready():
            self._waited += time.monotonic() - start

    def add(self, metrics: dict[str, Array]) -> None:
        """Takes the metrics of the next step."""
        self._pending.append(metrics)
        self._counted += 1

    def finished_step(self) -> int:
        """Returns the newest step that the device has finished, without waiting: the host runs ahead of it."""
        while self._num_ready < len(self._pending) and self._pending[self._num_ready]["loss"].is_ready():
            self._num_ready += 1
        return self._step + self._num_ready

    def fetch(self, keep: int) -> list[tuple[int, dict[str, float]]]:
        """Returns (step, metrics) of all steps since the last fetch but the newest `keep`."""
        ready = self._pending[: len(self._pending) - keep]
        first = self._step + 1
        self._pending = self._pending[len(ready) :]
        self._num_ready = max(0, self._num_ready - len(ready))
        self._step += len(ready)
        rows = [(first + i, jax.tree.map(float, row)) for i, row in enumerate(jax.device_get(ready))]
        self.last_loss = rows[-1][1]["loss"] if rows else self.last_loss
        return rows

    def rates(self) -> dict[str, float]:
        """Returns `steps_per_second` and `data_wait`, the share of the time in which the devices waited for a batch.

        They are of the time since the last call, or since the clock was restarted.
        """
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = {"steps_per_second": self._counted / seconds, "data_wait": self._waited / seconds}
        self.restart_clock()
        return rates


def summary(rows: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Returns the means of the metrics over the good ones of some steps, and how many were `skipped`."""
    good = [row for _, row in rows if not row["skipped"]]
    means_of_good = jax.tree.map(lambda *series: float(np.mean(series)), *good) if good else {}
    return means_of_good | {"skipped": float(len(rows) - len(good))}
