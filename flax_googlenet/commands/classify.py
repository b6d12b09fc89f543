"""What ``flax-googlenet classify`` does: runs the network over images, and tells its answers."""

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from jax import numpy as jnp
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from scipy.special import softmax

from flax_googlenet.commands.results import SUFFIXES, Row, open_results
from flax_googlenet.commands.status import CommandError, Status, draws_progress, message_console, write_output
from flax_googlenet.errors import printable
from flax_googlenet.images.files import describe_unreadable, display_name, find_images, read_ahead
from flax_googlenet.images.preprocessing import preprocess
from flax_googlenet.inference.predictor import Predictor, make_predictor
from flax_googlenet.weights.files import load_weights, require_folder_of

DEFAULT_WEIGHTS = (Path("googlenet-imagenet.safetensors"), Path("googlenet-random.safetensors"))
"""The outputs of ``convert/port_weights.py``, looked for in the working folder."""


def classify(
    arguments: Sequence[str], *, weights: Path | None, as_json: bool, output: Path | None, top: int, batch_size: int
) -> Status:
    """Classifies images and tells the answers, on standard output or in a file; the arguments are the command line's.

    Raises:
        CommandError: if the arguments are wrong, or nothing can be done at all.
        OSError: if the output cannot be written.
    """
    if not arguments:
        raise CommandError(Status.USAGE, "no images: name files, folders or globs")
    if top < 1 or batch_size < 1:
        raise CommandError(Status.USAGE, "--top and --batch-size must be at least 1")
    if output and output.suffix not in SUFFIXES:
        raise CommandError(Status.USAGE, f"{output}: --output must end in one of {', '.join(SUFFIXES)}")
    if output and as_json:
        raise CommandError(Status.USAGE, "--json is for the standard output: leave it out, or --output")
    if output:
        require_folder_of(output)
    screen, notes = Console(highlight=False), message_console()
    failed = done = skipped = 0

    def fail(message: str) -> None:
        nonlocal failed
        failed += 1
        notes.print(f"[bold red]error:[/] {escape(printable(message))}")

    def warn(message: str) -> None:
        notes.print(f"[bold yellow]warning:[/] {escape(printable(message))}")

    unreadable = Counter[str]()
    paths = find_images(arguments, fail, unreadable)
    first = next(paths, None)
    if first is None:
        return Status.NOT_DONE
    loaded = load_weights(weights or _default_weights(), dtype=jnp.float32)
    top = min(top, loaded.model.num_classes)
    if loaded.metadata.get("source") == "random":
        warn("these weights are random: the answers mean nothing")

    predict = make_predictor(loaded.model, loaded.variables)
    with nullcontext() if output is None else open_results(output, loaded.digest, top, warn) as results:

        def is_new(path: str) -> bool:
            nonlocal skipped
            new = results is None or results.claim(display_name(path))
            skipped += not new
            return new

        start = time.perf_counter()
        # On the terminal that shows the answers, progress would be noise.
        hidden = not draws_progress(notes) or (screen.file.isatty() and output is None)
        with _progress(notes, hidden) as progress:
            task = progress.add_task("", total=None, rate=0.0)
            new = filter(is_new, itertools.chain([first], paths))
            read = functools.partial(preprocess, size=loaded.image_size)
            images = read_ahead(new, read, 2 * batch_size, fail)
            for rows in _answers(predict, images, batch_size, top, loaded.class_names):
                if results:
                    results.append(rows)
                elif as_json:
                    write_output("".join(f"{json.dumps(row)}\n" for row in rows))
                else:
                    with screen.capture() as blocks:
                        for row in rows:
                            screen.print(_block(row))
                    write_output(blocks.get())
                done += len(rows)
                progress.update(task, completed=done, rate=done / (time.perf_counter() - start))
        seconds = time.perf_counter() - start
    if unreadable:
        fail(describe_unreadable(unreadable))
        failed += unreadable.total() - 1  # that message stands for all of them

    summary = f"{done} image{'' if done == 1 else 's'} in {seconds:.1f} s, {done / seconds:.1f} images/s"
    if skipped:
        summary += f"; {skipped} were done before"
    if failed:
        summary += f"; [bold red]{failed} could not be read[/]"
    notes.print(summary)
    return Status.SOME_UNREADABLE if failed else Status.DONE


def _default_weights() -> Path:
    for path in DEFAULT_WEIGHTS:
        if path.is_file():
            return path
    raise CommandError(
        Status.NOT_DONE,
        f"no weights: name them with --weights, or make {DEFAULT_WEIGHTS[0]} in this folder with "
        "python convert/port_weights.py imagenet",
    )


def _answers(
    predict: Predictor,
    images: Iterator[tuple[str, np.ndarray]],
    batch_size: int,
    top: int,
    class_names: Sequence[str] | None,
) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(images, batch_size)):
        logits = np.asarray(predict(np.stack([pixels for _, pixels in batch])), np.float64)
        if not np.isfinite(logits).all():
            raise CommandError(Status.NOT_DONE, "the weights are wrong: their answers are not finite")
        yield [
            {"image": display_name(path), "predictions": rank(row, top, class_names)}
            for (path, _), row in zip(batch, logits, strict=True)
        ]


def rank(logits: np.ndarray, top: int, class_names: Sequence[str] | None) -> list[dict[str, int | str | float | None]]:
    """The ``top`` likeliest classes of float64 logits [num_classes], the likeliest first."""
    probabilities = softmax(logits)
    return [
        {
            "index": int(index),
            "label": class_names[index] if class_names else None,
            "probability": float(f"{probabilities[index]:.6g}"),  # the logits are float32
        }
        for index in np.argsort(-probabilities, kind="stable")[:top]
    ]


def _block(row: Row) -> Group:
    table = Table.grid(padding=(0, 2))
    for prediction in row["predictions"]:
        probability = prediction["probability"]
        label = prediction["label"] or f"class {prediction['index']}"
        bar = ProgressBar(total=1, completed=probability, width=30)
        table.add_row("", Text(printable(label)), f"{probability:7.2%}", bar)
    return Group(Text(printable(row["image"]), style="bold"), table, "")


def _progress(console: Console, hidden: bool) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.completed} images, {task.fields[rate]:.1f} images/s"))
    # Redirection would send the answers, too, to the terminal.
    return Progress(
        *columns, console=console, transient=True, disable=hidden, redirect_stdout=False, redirect_stderr=False
    )
