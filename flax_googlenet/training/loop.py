"""The run: data, devices, checkpoints, log and signals around the pure step."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from flax_googlenet.commands.status import CommandError, Status, message_console
from flax_googlenet.errors import printable
from flax_googlenet.evaluation.ensembles import past_trainings, trainings_of
from flax_googlenet.files import require_replaceable, write_atomically
from flax_googlenet.inference.compiling import BackendError, require_backend
from flax_googlenet.training.checkpoints import CheckpointSaveError
from flax_googlenet.training.data import Batch, eval_batches, made_ahead, train_batches
from flax_googlenet.training.datasets import DataError, Dataset, open_data
from flax_googlenet.training.devices import Devices, joined
from flax_googlenet.training.logs import RunLog
from flax_googlenet.training.outcome import BEST, MODEL, write_outcome, write_weights
from flax_googlenet.training.preparation import (
    RECIPE,
    describe_classes,
    find_head,
    initial_state,
    resume,
    save,
    weigh_classes,
)
from flax_googlenet.training.reader import WaitStoppedError
from flax_googlenet.training.recipe import Recipe, schedule
from flax_googlenet.training.run_folder import WorkdirInUseError, claim
from flax_googlenet.training.speed import Speed
from flax_googlenet.training.step import Batch as DeviceBatch
from flax_googlenet.training.step import Metrics, TrainState, eval_step, train_step
from flax_googlenet.training.stopping import StopSignals
from flax_googlenet.training.tally import Tally, TooMuchError
from flax_googlenet.weights.checkpoint import CheckpointError, load_weights


def train(
    data: str,
    workdir: Path,
    recipe: Recipe,
    *,
    weights: Path | None = None,
    distributed: bool = False,
    override: bool = False,
) -> Status:
    """Trains to the end of the recipe, or until a signal, from the newest checkpoint in ``workdir`` if there is one.

    On a CPU a run that was stopped, by whatever means, and resumed ends in the same bits as one that was not.

    Args:
        data: as for ``open_data``.
        workdir: the folder of the run: ``recipe.json``, ``checkpoints/``, ``metrics.jsonl``, TensorBoard's events,
            ``best.safetensors``, which has the weights of the best evaluation so far, and at the end
            ``model.safetensors`` and ``curves.png``. All processes must see the same one.
        recipe: what to do.
        weights: a file of ``flax_googlenet.save`` to start from; its head is replaced if it has other classes.
        distributed: whether this is one of several processes, which the environment tells.
        override: whether to go on in ``workdir`` with another recipe, other data or other weights.

    Returns:
        DONE, INTERRUPTED or TERMINATED.

    Raises:
        CommandError: NOT_DONE if nothing is trained, GAVE_UP if the run stopped itself.
    """
    with ExitStack() as stack:
        if distributed:
            stack.enter_context(joined())
        try:
            require_backend()
            run, batches = _begin(data, workdir, recipe, weights, override, stack)
        except (BackendError, DataError, CheckpointError, WorkdirInUseError) as error:
            raise CommandError(Status.NOT_DONE, error) from error
        except OSError as error:
            raise CommandError(Status.NOT_DONE, _unwritten(error, workdir)) from error
        except jax.errors.JaxRuntimeError as error:
            raise CommandError(Status.GAVE_UP, _reason(error)) from error
        try:
            return run.train(batches) or run.finish(data)
        except (TooMuchError, DataError) as error:
            raise CommandError(Status.GAVE_UP, f"{error}; {run.last_saved}") from error
        except OSError as error:
            raise CommandError(Status.GAVE_UP, f"{_unwritten(error, workdir)}; {run.last_saved}") from error
        except jax.errors.JaxRuntimeError as error:
            raise CommandError(Status.GAVE_UP, f"{_reason(error)}; {run.last_saved}") from error


def _begin(
    data: str, workdir: Path, recipe: Recipe, weights: Path | None, override: bool, stack: ExitStack
) -> tuple["Run", Iterator[Batch]]:
    """The run before its next step, and the batches from there on; ``stack`` closes its log and its input."""
    devices = Devices()
    if recipe.batch_size % jax.device_count():
        fitting = max(1, recipe.batch_size // jax.device_count()) * jax.device_count()
        reason = f"a batch of {recipe.batch_size} cannot be shared evenly by {devices}"
        raise CommandError(Status.NOT_DONE, f"{reason}: choose --recipe.batch-size {fitting}, or another multiple")
    start = load_weights(weights, dtype=jnp.float32) if weights else None
    earlier = trainings_of(str(weights), start.metadata) if start else ()
    train_data, held_out = open_data(data, held_out=recipe.held_out, seed=recipe.seed, earlier=earlier)
    steps_per_epoch = recipe.steps_per_epoch(len(train_data))
    total = steps_per_epoch * recipe.epochs
    if not total:
        reason = f"{len(train_data)} images are less than a batch of {recipe.batch_size}"
        largest = len(train_data) // jax.device_count() * jax.device_count()
        way_out = (
            f"choose --recipe.batch-size {largest} or less" if largest else f"a batch needs one for each of {devices}"
        )
        raise CommandError(Status.NOT_DONE, f"{reason}: {way_out}")
    if total < recipe.accumulate:
        reason = f"{len(train_data)} images make {total} steps, and a change of the weights takes {recipe.accumulate}"
        raise CommandError(Status.NOT_DONE, f"{reason}: choose --recipe.accumulate {total} or less, or more epochs")
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "data": [train_data.fingerprint, held_out.fingerprint],
        "weights": start.digest if start else None,
    }
    head = find_head(train_data.class_names, data, start, str(weights)) if start else None
    shapes, make_state = initial_state(devices, recipe, train_data, steps_per_epoch, start, head)
    if jax.process_index() == 0:  # only now: a run that is refused leaves no folder
        stack.enter_context(claim(workdir, _warn_here))
    resumed = resume(workdir, shapes, identity, override, _say_here)
    if jax.process_index() == 0:  # before the state is computed, which takes a while
        balanced = recipe.class_weights == "balanced"
        lines = [*train_data.notes, *held_out.notes, *describe_classes(train_data, balanced=balanced)]
        lines.append(f"{len(train_data)} images to train on, {len(held_out)} held out, {total} steps, {devices}")
        if head and not resumed:
            lines.append(head.reason)
        if start and start.metadata.get("source") == "random":
            lines.append(f"warning: the weights of {weights} are random: the training starts from nothing")
        for line in dict.fromkeys(lines):
            _say_here(line)
    tally, state = resumed or (Tally(trained_before=past_trainings(start.metadata) if start else []), make_state())
    state = weigh_classes(state, devices, train_data)
    # The other processes wait for the step of this one: only an input that hangs may keep it from that.
    signals = StopSignals(patience=0.0 if jax.process_count() == 1 else 10.0)
    batches = train_batches(train_data, recipe, tally.step, stopped=signals.end_wait, **devices.share)
    stack.enter_context(closing(batches))
    log = None
    if jax.process_index() == 0:
        for name in (MODEL, BEST):
            require_replaceable(workdir / name)  # before the work, not after it
        write_atomically(workdir / RECIPE, recipe.to_json().encode())
        log = stack.enter_context(RunLog(workdir, total, tally.step))
    run = Run(
        workdir, recipe, train_data, held_out, steps_per_epoch, total, devices, identity, tally, state, log, signals
    )
    if tally.step:
        run.say(f"going on from the checkpoint of step {tally.step}")
    return run, batches


@dataclasses.dataclass
class Run:
    """A run under way: what changes from step to step, with the files and the devices around it."""

    workdir: Path
    recipe: Recipe
    train_data: Dataset
    held_out: Dataset
    steps_per_epoch: int
    total: int
    devices: Devices
    identity: dict[str, Any]
    tally: Tally
    state: TrainState
    log: RunLog | None
    signals: StopSignals

    def __post_init__(self) -> None:
        self.last_saved = _last_saved(self.tally.step)
        self.held_out_metrics: dict[str, float] = {}
        self.said: set[str] = set()
        self.speed = Speed(self.recipe.batch_size)
        self.dropout_key = self.devices.replicate(jax.random.key(self.recipe.seed))
        self.evaluate_batch = self.devices.jit(_evaluate_batch)

    def say(self, *messages: str) -> None:
        """Says each message once, in the first process."""
        for message in messages:
            if self.log and message not in self.said:
                self.log.message(message)
            self.said.add(message)

    def _say_anywhere(self, message: str) -> None:
        """What only this process knows of."""
        if self.log:
            self.say(message)
        elif message not in self.said:
            self.said.add(message)
            _say_here(message)

    def train(self, batches: Iterator[Batch]) -> Status | None:
        """Trains to the end, or until a signal: then there is a checkpoint, and it returns the signal's status."""
        first_step = self.tally.step
        if first_step < self.total:
            upcoming = self._to_devices(next(batches))
            self.say("compiling the step")
            # Before signals are caught: one that comes meanwhile need not wait.
            one_step = self.devices.jit(
                _one_step(schedule(self.recipe, self.steps_per_epoch), self.recipe), donate=(0,)
            )
            self.one_step = one_step.lower(self.state, upcoming, self._stop_flags(), self.dropout_key).compile()
        with self.signals:
            while True:
                # An evaluation comes after the checkpoint of its step: a run that goes on from there begins with it.
                ended = self.tally.step >= self.total  # beyond it where a shorter recipe overrides
                epoch_ended = self.tally.step > 0 and self.tally.step % self.steps_per_epoch == 0
                if (ended or epoch_ended) and not self._evaluate():
                    return self._stop()
                if ended or (epoch_ended and self._is_out_of_patience()):
                    break
                following = self._step(upcoming, batches)
                if following is None:
                    return self._stop()
                upcoming = following
                if self.tally.step % self.recipe.checkpoint_every == 0 or self.tally.step == self.total:
                    self._save()
            if self.log and self.tally.step > first_step:
                with suppress(WaitStoppedError, DataError):  # the run has ended, with or without this line
                    self.say(self.speed.compare(batches, made_ahead(self.recipe.workers)))
        return None

    def finish(self, data: str) -> Status:
        """Writes what the run leaves; ``data`` is as the command line named it."""
        if self.tally.unreadable or self.tally.not_finite:
            counts = f"unreadable images: {len(self.tally.unreadable)}, steps not finite: {self.tally.not_finite}"
            self.say(f"left out of the training: {counts}")
        if self.log:
            best = (self.tally.best_step, self._best())
            write_outcome(self.workdir, self.state, self._metadata(), data, best, self.say)
        return Status.DONE

    def _step(self, batch: DeviceBatch, batches: Iterator[Batch]) -> DeviceBatch | None:
        """Make one step; return the next batch, or None if a signal came."""
        start = time.perf_counter()
        self.state, outputs = self.one_step(self.state, batch, self._stop_flags(), self.dropout_key)
        try:
            upcoming = self._to_devices(next(batches))  # while the devices compute
        except WaitStoppedError:
            upcoming = None
        input_seconds = time.perf_counter() - start
        starved = outputs["loss"].is_ready()
        metrics = jax.device_get(outputs)
        seconds = time.perf_counter() - start

        self.tally.step += 1
        images_per_second = self.speed.add(seconds, starved)
        skipped, finite, stopped = metrics.pop("skipped"), metrics.pop("finite"), metrics.pop("stop")
        if self.log:
            rate = {} if images_per_second is None else {"images_per_second": images_per_second}
            self.log.train(self.tally.step, metrics | rate | {"input_seconds": input_seconds})
        unreadable = skipped[skipped >= 0].tolist()
        self.tally.add_unreadable(self.train_data, unreadable, self.recipe.max_corrupt, self.say)
        self.tally.add_finite(bool(finite), self.say)
        if upcoming is None:
            self._require_no_others()
        return None if stopped or self._stopped_alone() else upcoming

    def _evaluate(self) -> bool:
        """Evaluates the held-out images; returns False if a signal came meanwhile."""
        sums, count = dict.fromkeys(("loss", "accuracy", "top5"), 0.0), 0
        try:
            for batch in eval_batches(
                self.held_out,
                batch_size=self.recipe.batch_size,
                image_size=self.recipe.image_size,
                fail=self._say_anywhere,
                workers=self.recipe.workers,
                stopped=self.signals.end_wait,
                **self.devices.share,
            ):
                arrays = self.devices.split({"image": batch["image"], "label": batch["label"]})
                metrics = jax.device_get(self.evaluate_batch(self.state, arrays, self._stop_flags()))
                if metrics["stop"] or self._stopped_alone():
                    return False
                rows = int(metrics["count"])
                count += rows
                sums = {name: value + rows * float(metrics[name]) for name, value in sums.items()}
        except WaitStoppedError:
            self._require_no_others()
            return False
        if count == 0:
            raise TooMuchError(f"none of the {len(self.held_out)} held-out images can be read")
        self.held_out_metrics = {name: value / count for name, value in sums.items()}
        if self.log:
            self.log.evaluated(self.tally.step, self.held_out_metrics)
        if self.tally.add_accuracy(self.held_out_metrics["accuracy"]) and self.log:
            write_weights(self.workdir / BEST, self.state, self._metadata())
        return True

    def _is_out_of_patience(self) -> bool:
        """Whether the run has to stop early: then there is a checkpoint. All processes know the same accuracies."""
        evaluations = self._epoch(self.tally.step - self.tally.best_step)
        if not self.recipe.patience or evaluations < self.recipe.patience:
            return False
        self.say(
            f"stopping early after epoch {self._epoch(self.tally.step)}: the best accuracy is still {self._best()}"
        )
        self._save()
        return True

    def _best(self) -> str:
        return f"{self.tally.best_accuracy:.2%} after epoch {self._epoch(self.tally.best_step)}"

    def _epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def _metadata(self) -> dict[str, Any]:
        """What a file of weights says of the run and of its last evaluation."""
        return {
            "class_names": list(self.train_data.class_names),
            "recipe": self.identity["recipe"],
            "trained_on": self.train_data.fingerprint,
            "trained_before": self.tally.trained_before,
            "epoch": self._epoch(self.tally.step),
            "step": self.tally.step,
            **self.held_out_metrics,
        }

    def _require_no_others(self) -> None:
        """Raise a CommandError if other processes wait for the step that this one cannot make for want of a batch."""
        if jax.process_count() > 1:
            raise CommandError(Status.GAVE_UP, f"stopped while it waited for images; {self.last_saved}")

    def _save(self) -> bool:
        if self.log:
            self.log.sync()
        try:
            save(self.workdir, self.tally, self.state, self.identity, self.recipe.keep)
        except CheckpointSaveError as error:
            self.say(f"warning: {error}; {self.last_saved}")
            return False
        self.last_saved = _last_saved(self.tally.step)
        return True

    def _stop(self) -> Status:
        if not self._save():
            raise CommandError(Status.GAVE_UP, f"stopped after step {self.tally.step}; {self.last_saved}")
        self.say(f"stopped after step {self.tally.step} of {self.total}; the same command goes on from there")
        return self.signals.status or Status.TERMINATED  # the signal may have been another process's

    def _to_devices(self, batch: Batch) -> DeviceBatch:
        skipped = np.where(batch["used"] == batch["index"], -1, batch["index"]).astype(np.int32)
        return self.devices.split({"image": batch["image"], "label": batch["label"], "skipped": skipped})

    def _stop_flags(self) -> jax.Array:
        """For each device whether its process was told to stop. All see it, and stop at the same step."""
        flags = np.full(jax.local_device_count(), self.signals.status is not None)
        return self.devices.split({"stop": flags})["stop"]

    def _stopped_alone(self) -> bool:
        """Whether a signal came and there is no other process that must know of it."""
        return jax.process_count() == 1 and self.signals.status is not None


def _one_step(learning_rate: optax.Schedule, recipe: Recipe) -> Callable[..., tuple[TrainState, Metrics]]:
    def one_step(
        state: TrainState, batch: DeviceBatch, stop: jax.Array, dropout_key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix integers and floats
            rate = jnp.asarray(learning_rate(state.step // recipe.accumulate))
        state, metrics = train_step(state, {"image": batch["image"], "label": batch["label"]}, dropout_key)
        return state, metrics | {"learning_rate": rate, "skipped": batch["skipped"], "stop": stop.any()}

    return one_step


def _evaluate_batch(state: TrainState, batch: DeviceBatch, stop: jax.Array) -> Metrics:
    return eval_step(state, batch) | {"stop": stop.any()}


def _warn_here(message: str) -> None:
    _say_here(f"warning: {message}")


def _say_here(message: str) -> None:
    message_console().print(printable(message), markup=False)


def _unwritten(error: OSError, workdir: Path) -> str:
    return f"cannot write {error.filename or workdir}: {error.strerror}"


def _reason(error: jax.errors.JaxRuntimeError) -> str:
    """What a person can do about it; where that is nothing, it is raised again."""
    first_line = str(error).splitlines()[0]
    if "RESOURCE_EXHAUSTED" in first_line:
        return f"the devices' memory is too small: choose a smaller batch_size, with accumulate ({first_line})"
    if jax.process_count() > 1:
        return f"another process of the run is gone: start all of them again ({first_line})"
    raise error


def _last_saved(step: int) -> str:
    return f"the last checkpoint is that of step {step}" if step else "there is no checkpoint yet"
