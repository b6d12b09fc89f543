"""``train``: a run from its preparation to its end, and the exceptions with which it ends otherwise."""

import functools
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import jax

from flax_googlenet.errors import printable
from flax_googlenet.files import require_replaceable, write_atomically
from flax_googlenet.inference.compiling import require_backend
from flax_googlenet.training.checkpoints import checkpoint_path
from flax_googlenet.training.data import train_batches
from flax_googlenet.training.datasets import DataError
from flax_googlenet.training.devices import Devices, joined
from flax_googlenet.training.history import past_trainings
from flax_googlenet.training.logs import Progress, RunLog
from flax_googlenet.training.loop import Run, TrainingResult
from flax_googlenet.training.preparation import initial_state, make_plan, update_class_weights
from flax_googlenet.training.reader import Reader
from flax_googlenet.training.recipe import PRESETS, Recipe, RecipeError
from flax_googlenet.training.run_folder import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    LAST_WEIGHTS,
    RECIPE,
    WorkdirError,
    claim,
    resume_run,
)
from flax_googlenet.training.stopping import RunCounts, StopSignals, TooManyFailuresError, TrainingStopped
from flax_googlenet.weights.checkpoint import CheckpointError
from flax_googlenet.weights.pretrained import PRETRAINED, pretrained_file


def _print(message: str) -> None:
    print(printable(message))  # noqa: T201  a notebook has no other place for messages


def train(
    data: str | Path,
    workdir: str | Path,
    recipe: Recipe | None = None,
    *,
    weights: str | Path | None = None,
    distributed: bool = False,
    override: bool = False,
    report: Callable[[str], None] = _print,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a network to the end of a recipe, from the newest checkpoint in ``workdir`` if there is one.

    On a CPU, a training that was stopped by whatever means and continued ends in the same bits as one that was not.
    The first Ctrl-C, or a SIGTERM, lets the current step finish and saves a checkpoint.

    Example::

        from flax_googlenet.training import train

        result = train("photos", "run", weights="imagenet")
        model, variables = flax_googlenet.load(result.best_weights)

    Args:
        data: A folder of images, or the string ``digits``, as for ``flax-googlenet train``.
        workdir: The folder of the run. It gets ``recipe.json``, ``checkpoints/``, ``metrics.jsonl``, files for
            TensorBoard, ``best.safetensors`` with the best weights so far, and at the end ``model.safetensors`` and
            ``curves.png``. All processes of a run must see the same folder.
        recipe: How to train. By default the preset ``finetune`` if there are weights, ``digits`` for the data
            ``digits``, and ``imagenet`` otherwise.
        weights: A file of ``flax_googlenet.save`` to start from, or a name for ``flax_googlenet.pretrained``. New heads
            replace its own if the classes are others.
        distributed: Whether this is one of several processes that train together, which the environment describes.
        override: Whether to continue the run in ``workdir`` even if the recipe, the data or the weights have changed.
        report: Called with messages. By default they are printed.
        progress: Called after each step with its number, the number of all steps, and the metrics in words. By default
            they are reported in a message every ten seconds.

    Raises:
        TrainingStopped: If the training ended before its end, by a signal or an error; ``path`` is its last checkpoint.
        GoogLeNetError: If it could not begin: a RecipeError, DataError, CheckpointError, DownloadError, WorkdirError,
            BackendError or DistributedError.
    """
    if isinstance(data, Path) and str(data) == "digits":
        data = "./digits"  # a path is a folder
    _check_types(recipe, weights)
    if str(weights) in PRETRAINED:
        weights = pretrained_file(str(weights))
    workdir, weights = Path(workdir), Path(weights) if weights else None
    recipe = recipe or PRESETS["finetune" if weights else "digits" if data == "digits" else "imagenet"]
    with ExitStack() as stack:
        if distributed:
            stack.enter_context(joined())
        try:
            require_backend()
            run, batches = _begin(str(data), workdir, recipe, weights, override, report, progress, stack)
        except OSError as error:
            raise WorkdirError(_not_written(error, workdir)) from error
        except jax.errors.JaxRuntimeError as error:
            raise TrainingStopped(_way_out(error)) from error
        try:
            result = run.train(batches)
        except (TooManyFailuresError, DataError) as error:
            raise run.stopped(str(error)) from error
        except OSError as error:
            raise run.stopped(_not_written(error, workdir)) from error
        except jax.errors.JaxRuntimeError as error:
            raise run.stopped(_way_out(error)) from error
    if isinstance(result, TrainingStopped):  # raised here: within the block it would end this process before the others
        raise result
    return result


def _check_types(recipe: object, weights: object) -> None:
    if not isinstance(recipe, Recipe | None):
        raise RecipeError(f"recipe must be a Recipe, such as PRESETS['finetune'], not a {type(recipe).__name__}")
    if not isinstance(weights, str | Path | None):
        names, kind = " or ".join(map(repr, PRETRAINED)), type(weights).__name__
        raise CheckpointError(
            f"weights must be the path of a file or {names}, not a {kind}: write a file with flax_googlenet.save"
        )


def _begin(
    data: str,
    workdir: Path,
    recipe: Recipe,
    weights_path: Path | None,
    override: bool,
    report: Callable[[str], None],
    progress: Progress | None,
    stack: ExitStack,
) -> tuple[Run, Reader]:
    """Return the run before its next step, and the batches from there on; ``stack`` closes its log and its input."""
    devices, is_first = Devices(), jax.process_index() == 0
    plan, weights, head = make_plan(data, recipe, weights_path, devices)
    shapes, make_state = initial_state(plan, weights, head, devices)
    report_first = report if is_first else lambda message: None
    if is_first:  # only now: a run that is refused leaves no folder
        stack.enter_context(claim(workdir, lambda message: report(f"warning: {message}")))
    resumed = resume_run(workdir, shapes, plan.identity, override, report_first)
    messages = [*plan.messages]
    if head and not resumed:
        messages.append(head.reason)
    is_random = weights is None or weights.metadata.get("source") == "random"
    if weights and is_random and not resumed:
        messages.append(f"warning: the weights of {weights_path} are random: the training starts from nothing")
    if recipe.frozen and is_random and not resumed:
        messages.append("warning: the frozen blocks stay random: start from trained weights, or freeze no block")
    for message in messages:  # before the state is computed, which takes a while
        report_first(message)
    trained_before = past_trainings(weights.metadata) if weights else []
    counts, state = resumed or (RunCounts(trained_before=trained_before), make_state())
    state = update_class_weights(state, plan, devices)
    # In a distributed run the other processes wait for this one's step: a signal ends the wait for an input only if
    # that hangs.
    signals = StopSignals(patience=0.0 if jax.process_count() == 1 else 10.0)
    batches = train_batches(
        plan.train_data, recipe, counts.step, stopped=signals.end_wait, report=report, **devices.share
    )
    stack.enter_context(closing(batches))
    log = None
    if is_first:
        for name in (LAST_WEIGHTS, BEST_WEIGHTS):
            require_replaceable(workdir / name)  # before the work, not after it
        write_atomically(workdir / RECIPE, recipe.to_json().encode())
        log = RunLog(
            workdir,
            plan.total_steps,
            counts.step,
            report=report,
            progress=progress,
            num_classes=len(plan.train_data.class_names),
        )
        stack.enter_context(log)
    if counts.step:
        report_first(f"continuing from the checkpoint of step {counts.step}")
    checkpoint = checkpoint_path(workdir / CHECKPOINTS, counts.step) if resumed else None
    report_once = functools.cache(report)
    run = Run(workdir, plan, devices, signals, log, report_first, report_once, counts, state, checkpoint)
    return run, batches


def _not_written(error: OSError, workdir: Path) -> str:
    return f"cannot write {error.filename or workdir}: {error.strerror}"


def _way_out(error: jax.errors.JaxRuntimeError) -> str:
    """Return what a person can do about an error of the devices; one that only a developer can mend is raised again."""
    first_line = str(error).splitlines()[0]
    if "RESOURCE_EXHAUSTED" in first_line:
        return f"the devices' memory is too small: choose a smaller batch_size, with accumulate ({first_line})"
    if jax.process_count() > 1:
        return f"another process of the run is gone: start all of them again ({first_line})"
    raise error
