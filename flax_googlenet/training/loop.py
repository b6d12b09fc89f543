"""The training loop: steps, evaluations, checkpoints, the log, and stopping at a signal."""

import dataclasses
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from flax_googlenet.training.checkpoints import CheckpointSaveError
from flax_googlenet.training.data import eval_batches
from flax_googlenet.training.devices import Devices
from flax_googlenet.training.logs import RunLog, Speed, draw_curves
from flax_googlenet.training.preparation import Plan
from flax_googlenet.training.reader import HostBatch, Reader, WaitStoppedError
from flax_googlenet.training.recipe import schedule
from flax_googlenet.training.run_folder import BEST_WEIGHTS, LAST_WEIGHTS, save_run, write_weights
from flax_googlenet.training.step import Batch, Metrics, TrainState, eval_step, train_step
from flax_googlenet.training.stopping import (
    RunCounts,
    StopRequestedError,
    StopSignals,
    TooManyFailuresError,
    TrainingStopped,
)


class TrainingResult(NamedTuple):
    """What a training has reached at its end."""

    metrics: dict[str, float]
    """Means of ``loss``, ``accuracy`` and ``top5`` over the held-out images, with the last weights."""
    weights: Path
    """The last weights, ``model.safetensors`` in the folder of the run."""
    best_weights: Path
    """The weights of the evaluation with the best accuracy, ``best.safetensors`` in the folder of the run."""
    stopped_early: bool
    """Whether the training ended before the last epoch because the accuracy no longer rose, as ``patience`` asks."""


@dataclasses.dataclass
class Run:
    """A training under way."""

    workdir: Path
    plan: Plan
    devices: Devices
    signals: StopSignals
    log: RunLog | None
    """The log of the run, in the first process."""
    report: Callable[[str], None]
    """Reports a message, in the first process."""
    report_once: Callable[[str], None]
    """Reports a message about held-out images, in the process that reads them, and not again in each epoch."""
    counts: RunCounts
    state: TrainState
    checkpoint: Path | None
    """The last checkpoint."""

    def train(self, batches: Reader) -> TrainingResult | TrainingStopped:
        """Train to the end of the recipe, or until a signal, after which a checkpoint is saved.

        Returns:
            The result or, after a signal, the exception that the caller raises.

        Raises:
            TooManyFailuresError, DataError: If too many steps or images fail, or no batch of images comes.
            TrainingStopped: If a signal ends the wait for images in one of several processes.
        """
        plan, counts = self.plan, self.counts
        evaluate_batch = self.devices.jit(lambda state, batch, stop: eval_step(state, batch) | {"stop": stop.any()})
        first_step, speed, stopped_early = counts.step, Speed(plan.recipe.batch_size), False
        if first_step < plan.total_steps:
            batch = self._to_devices(next(batches))
            self.report("compiling the step")
            # Signals are not handled yet: one that comes while it compiles ends the process at once.
            step = self._compile_step(batch)
        with self.signals:
            try:
                while True:
                    # An evaluation follows the checkpoint of its step, and a continued run begins with it.
                    at_end = counts.step >= plan.total_steps  # beyond it if a shorter recipe overrides another one
                    if at_end or (counts.step > 0 and counts.step % plan.steps_per_epoch == 0):
                        metrics = self._evaluate(evaluate_batch)
                        stopped_early = not at_end and self._is_out_of_patience()
                    if at_end or stopped_early:
                        break
                    batch = self._take_step(step, batch, batches, speed)
                    if counts.step % plan.recipe.checkpoint_every == 0 or counts.step == plan.total_steps:
                        self._save_checkpoint()
            except StopRequestedError:
                return self._stopped_by_signal()
        if counts.step > first_step + 1:
            self.report(str(speed))
        return self._finish(metrics, stopped_early)

    def _compile_step(self, batch: Batch) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
        recipe = self.plan.recipe
        learning_rate = schedule(recipe, self.plan.steps_per_epoch)

        def one_step(
            state: TrainState, batch: dict[str, jax.Array], stop: jax.Array, dropout_key: jax.Array
        ) -> tuple[TrainState, Metrics]:
            with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix integers and floats
                rate = jnp.asarray(learning_rate(state.step // recipe.accumulate))
            state, metrics = train_step(state, batch, dropout_key)
            return state, metrics | {"learning_rate": rate, "skipped": batch["skipped"], "stop": stop.any()}

        dropout_key = self.devices.replicate(jax.random.key(recipe.seed))
        lowered = self.devices.jit(one_step, donate=(0,)).lower(self.state, batch, self._stop_flags(), dropout_key)
        compiled = lowered.compile()
        return lambda state, batch, stop: compiled(state, batch, stop, dropout_key)

    def _take_step(self, step: Callable[..., Any], batch: Batch, batches: Reader, speed: Speed) -> Batch:
        """Take a step, read the next batch meanwhile, record the step, and return that batch.

        Raises:
            StopRequestedError: If a signal came. The step is done and recorded.
        """
        start = time.perf_counter()
        self.state, outputs = step(self.state, batch, self._stop_flags())
        upcoming = None
        with suppress(WaitStoppedError):
            upcoming = self._to_devices(next(batches))
        input_seconds = time.perf_counter() - start
        waited = outputs["loss"].is_ready()
        metrics = jax.device_get(outputs)
        times = speed.add(time.perf_counter() - start, waited) | {"input_seconds": input_seconds}

        self.counts.step += 1
        skipped, finite, stop = (metrics.pop(name) for name in ("skipped", "finite", "stop"))
        if self.log:
            self.log.train(self.counts.step, metrics | times)
        unreadable, max_corrupt = skipped[skipped >= 0].tolist(), self.plan.recipe.max_corrupt
        self.counts.add_unreadable(self.plan.train_data, unreadable, max_corrupt, self.report)
        self.counts.add_finite(bool(finite), self.report)
        if upcoming is None:
            self._require_alone()
        if upcoming is None or stop or self._stopped_alone():
            raise StopRequestedError
        return upcoming

    def _evaluate(self, evaluate_batch: Callable[..., Metrics]) -> dict[str, float]:
        """Return the metrics of the held-out images, and write the weights if they are the best so far.

        Raises:
            StopRequestedError: If a signal came.
        """
        recipe, sums, count = self.plan.recipe, dict.fromkeys(("loss", "accuracy", "top5"), 0.0), 0
        try:
            for batch in eval_batches(
                self.plan.held_out,
                recipe,
                fail=self.report_once,
                stopped=self.signals.end_wait,
                report=self.report_once,
                **self.devices.share,
            ):
                arrays = self.devices.split({"image": batch["image"], "label": batch["label"]})
                means = jax.device_get(evaluate_batch(self.state, arrays, self._stop_flags()))
                if means["stop"] or self._stopped_alone():
                    raise StopRequestedError
                rows = int(means["count"])
                count += rows
                sums = {name: value + rows * float(means[name]) for name, value in sums.items()}
        except WaitStoppedError:
            self._require_alone()
            raise StopRequestedError from None
        if count == 0:
            raise TooManyFailuresError(f"none of the {len(self.plan.held_out)} held-out images can be read")
        metrics = {name: value / count for name, value in sums.items()}
        if self.log:
            self.log.evaluated(self.counts.step, metrics)
        if self.counts.add_accuracy(metrics["accuracy"]) and self.log:
            write_weights(self.workdir / BEST_WEIGHTS, self.state, self._metadata(metrics))
        return metrics

    def _is_out_of_patience(self) -> bool:
        """Return whether the accuracy has not risen for too long. All processes know the same accuracies."""
        evaluations = self.plan.epoch(self.counts.step - self.counts.best_step)
        if not self.plan.recipe.patience or evaluations < self.plan.recipe.patience:
            return False
        epoch = self.plan.epoch(self.counts.step)
        self.report(f"stopping early after epoch {epoch}: the best accuracy is still {self._best()}")
        self._save_checkpoint()
        return True

    def _finish(self, metrics: dict[str, float], stopped_early: bool) -> TrainingResult:
        """Write the last weights and the curves."""
        if self.counts.unreadable or self.counts.not_finite:
            self.report(
                f"left out of the training: {len(self.counts.unreadable)} unreadable images and "
                f"{self.counts.not_finite} steps that were not finite"
            )
        result = TrainingResult(metrics, self.workdir / LAST_WEIGHTS, self.workdir / BEST_WEIGHTS, stopped_early)
        if self.log:
            write_weights(result.weights, self.state, self._metadata(metrics))
            try:
                draw_curves(self.workdir, (self.counts.best_step, self._best()))
            except OSError as error:
                self.report(f"warning: the curves cannot be drawn: {error.strerror}")
        self.report(f"the best weights are {result.best_weights}: {self._best()}")
        return result

    def _best(self) -> str:
        return f"{self.counts.best_accuracy:.2%} after epoch {self.plan.epoch(self.counts.best_step)}"

    def _metadata(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Return what a file of weights says about the run and the evaluation of these weights."""
        return {
            "class_names": list(self.plan.train_data.class_names),
            "recipe": self.plan.identity["recipe"],
            "trained_on": self.plan.train_data.fingerprint,
            "trained_before": self.counts.trained_before,
            "epoch": self.plan.epoch(self.counts.step),
            "step": self.counts.step,
            **metrics,
        }

    def _save_checkpoint(self) -> bool:
        """Save a checkpoint, and return whether that was possible. All processes call this."""
        if self.log:
            self.log.sync()
        try:
            self.checkpoint = save_run(self.workdir, self.counts, self.state, self.plan.identity, self.plan.recipe.keep)
        except CheckpointSaveError as error:
            self.report(f"warning: {error}; {self._last_checkpoint()}")
            return False
        return True

    def _last_checkpoint(self) -> str:
        return f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"

    def stopped(self, reason: str) -> TrainingStopped:
        """Return the exception for a run that has to stop, with its last checkpoint."""
        return TrainingStopped(f"{reason}; {self._last_checkpoint()}", self.checkpoint)

    def _stopped_by_signal(self) -> TrainingStopped:
        """Save a checkpoint, and return the exception for a run that a signal stops."""
        step = self.counts.step
        if not self._save_checkpoint():
            return self.stopped(f"stopped after step {step}")
        message = f"stopped after step {step} of {self.plan.total_steps}; the same command or call continues from there"
        received = self.signals.received or signal.SIGTERM  # another process may have received it
        return TrainingStopped(message, self.checkpoint, received)

    def _require_alone(self) -> None:
        """Raise if a signal ended the wait for a batch while other processes wait for the step with that batch."""
        if jax.process_count() > 1:
            raise self.stopped("stopped while it waited for images")

    def _stopped_alone(self) -> bool:
        """Return whether a signal came and no other process must agree to stop."""
        return jax.process_count() == 1 and self.signals.received is not None

    def _stop_flags(self) -> jax.Array:
        """Return for each device whether its process got a signal. All processes see all, and stop at the same step."""
        flags = np.full(jax.local_device_count(), self.signals.received is not None)
        return self.devices.split({"stop": flags})["stop"]

    def _to_devices(self, batch: HostBatch) -> Batch:
        skipped = np.where(batch["used"] == batch["index"], -1, batch["index"]).astype(np.int32)  # [b]
        return self.devices.split({"image": batch["image"], "label": batch["label"], "skipped": skipped})
