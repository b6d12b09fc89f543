"""What ``flax-googlenet evaluate`` does: accuracies and the confusion matrix of weights, or of several together."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from flax_googlenet.commands.status import CommandError, Status, draws_progress, message_console, write_output
from flax_googlenet.errors import listing, printable
from flax_googlenet.evaluation.confusion import Score, draw_confusion
from flax_googlenet.evaluation.ensembles import answers, image_size, make_networks
from flax_googlenet.images.files import display_name
from flax_googlenet.training.datasets import DataError, Dataset, find_data
from flax_googlenet.training.history import last_training
from flax_googlenet.weights.files import load_weights, require_folder_of


def evaluate(
    inputs: Sequence[str], *, num_crops: int, as_json: bool, confusion: Path | None, batch_size: int
) -> Status:
    """Evaluate weights on data and print the figures; the arguments are those of the command line.

    Raises:
        CommandError: if the arguments are wrong, or nothing can be done at all.
        OSError: if the output cannot be written.
    """
    usage = "name the weights and then the data: evaluate WEIGHTS DATA"
    if len(inputs) < 2:
        raise CommandError(Status.USAGE, usage)
    *paths, data = inputs
    for path in paths:
        if Path(path).is_dir():
            raise CommandError(Status.USAGE, f"{path} is a folder: {usage}")
    if data != "digits" and Path(data).is_file():
        raise CommandError(Status.USAGE, f"{data} is a file: {usage}")
    if batch_size < 1:
        raise CommandError(Status.USAGE, "--batch-size must be at least 1")
    if confusion:
        if confusion.suffix.lower() != ".png":
            raise CommandError(Status.USAGE, f"{confusion}: --confusion must end in .png")
        require_folder_of(confusion)
    notes = message_console()
    failed = 0

    def fail(message: str) -> None:
        nonlocal failed
        failed += 1
        notes.print(f"[bold red]error:[/] {escape(printable(message))}")

    ensemble = {path: load_weights(Path(path), dtype=jnp.float32) for path in paths}
    if random := [path for path, weights in ensemble.items() if weights.metadata.get("source") == "random"]:
        warning = f"the weights of {', '.join(random)} are random: the figures mean nothing"
        notes.print(f"[bold yellow]warning:[/] {escape(printable(warning))}")
    size = image_size(ensemble)
    try:
        dataset, which = find_data(data, [last_training(path, weights.metadata) for path, weights in ensemble.items()])
        networks, match = make_networks(ensemble, dataset.class_names, data)
    except DataError as error:
        raise CommandError(Status.NOT_DONE, error) from error
    for note in (*dataset.notes, *match.notes, *which):
        notes.print(escape(printable(note)))

    tally, start = Score(match.wanted, len(dataset.class_names)), time.perf_counter()
    with _progress(notes) as progress:
        task = progress.add_task("", total=len(dataset))
        for indices, probabilities in answers(networks, dataset, num_crops, size, batch_size, fail):
            tally.add(dataset.labels[indices], probabilities)
            rate = tally.count / (time.perf_counter() - start)
            text = f"{rate:.1f} images/s, top-1 {tally.top1:.2%}"
            progress.update(task, completed=tally.count + failed, description=text)
    seconds = time.perf_counter() - start
    if not tally.count:
        raise CommandError(Status.NOT_DONE, f"{data}: none of the {len(dataset)} images can be read")
    failed += dataset.unreadable

    if as_json:
        named = {"data": display_name(data), "weights": [display_name(path) for path in paths]}
        figures = {**named, "crops": num_crops, "image_size": size, "unreadable": failed, **_figures(tally, dataset)}
        write_output(json.dumps(figures) + "\n")
    else:
        printed = {"top-1": tally.top1, "top-5": tally.top5, "balanced accuracy": tally.balanced_accuracy}
        if len(match.wanted) <= 5:
            del printed["top-5"]  # it is always right
        write_output("".join(f"{name:17} {value:7.2%}\n" for name, value in printed.items()))
    if empty := [name for name, count in zip(dataset.class_names, tally.matrix.sum(1), strict=True) if not count]:
        classes = f"class{'es' * (len(empty) > 1)} {listing(map(repr, empty))}"
        notes.print(escape(printable(f"no image is evaluated of the {classes}")))
    if confusion:
        try:
            numbered = draw_confusion(confusion, tally.matrix, dataset.class_names)
        except OSError as error:
            raise CommandError(Status.NOT_DONE, f"cannot write {confusion}: {error.strerror}") from error
        if numbered:
            warning = f"warning: {confusion} shows numbers for {len(numbered)} class names, which no installed font can"
            warning += f" draw ({listing(map(repr, numbered))}): install a font that can, such as Noto Sans CJK"
            notes.print(escape(printable(warning)))
    summary = f"{tally.count} image{'' if tally.count == 1 else 's'} in {seconds:.1f} s, "
    summary += f"{tally.count / seconds:.1f} images/s"
    notes.print(summary + (f"; [bold red]{failed} could not be read[/]" if failed else ""))
    return Status.SOME_UNREADABLE if failed else Status.DONE


def _figures(tally: Score, dataset: Dataset) -> dict[str, Any]:
    counts, right = tally.matrix.sum(1), np.diagonal(tally.matrix)
    classes = {
        name: {"count": int(count), "top1": int(hits) / int(count) if count else None}
        for name, count, hits in zip(dataset.class_names, counts, right, strict=True)
    }
    return {
        "count": tally.count,
        "top1": tally.top1,
        "top5": tally.top5,
        "balanced_accuracy": tally.balanced_accuracy,
        "classes": classes,
    }


def _progress(console: Console) -> Progress:
    columns = (BarColumn(20), TextColumn("{task.completed}/{task.total} images, {task.description}"))
    # Redirection would send the figures, too, to the terminal.
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=not draws_progress(console),
        redirect_stdout=False,
        redirect_stderr=False,
    )
