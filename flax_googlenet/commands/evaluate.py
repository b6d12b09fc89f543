"""``flax-googlenet evaluate``."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from flax_googlenet.commands.arguments import Flag, Number, OptionalFile, require_batch_size
from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.commands.terminal import Messages, require_picture, write_output, writing
from flax_googlenet.commands.train import require_training_packages
from flax_googlenet.commands.weights import is_pretrained, weights_file
from flax_googlenet.errors import listing

if TYPE_CHECKING:
    from flax_googlenet.evaluation.confusion import Score

_ORDER = "name the weights and then the data: evaluate WEIGHTS DATA"


def evaluate(
    inputs: Annotated[tuple[str, ...], arg(metavar="WEIGHTS ... DATA", help_behavior_hint="")],
    /,
    *,
    crops: Annotated[Literal[1, 10, 144], arg(metavar="1|10|144")] = 1,
    json: Flag = False,
    confusion: OptionalFile = None,
    batch_size: Number = 32,
) -> Status:
    """Measure how often networks name the right class (top-1 and top-5).

    The balanced accuracy is the mean of the classes' recalls, so that a class of few images counts as much as one of
    many. With five classes or fewer top-5 is always right, and only the JSON has it.

    The classes of the data are found by name among those of the weights. Their order counts only where the weights
    have no class names, or where ImageNet's 1,000 classes have WordNet identifiers on one side (n01440764, ...) and
    names on the other. The images are resized to the size that the weights were trained for. Images that one of the
    networks was trained on are left out.

    Exit status:
      0    all images are evaluated
      1    some images could not be read; standard error names them, and the others are evaluated
      2    the command line is wrong
      3    nothing is evaluated: the data or the weights cannot be read, the weights cannot be downloaded, their
           classes differ, the output cannot be written, or JAX_PLATFORMS names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        inputs: Files of weights, or imagenet for torchvision's or bvlc for Berkeley's, and then the data. The
            probabilities of several networks are averaged. Files of weights are written by train, flax_googlenet.save
            and, in the repository, port_weights.py. The data are a folder with a folder for each class, a folder with
            such a folder named val, a folder of IDX files, or the word digits for scikit-learn's digits.
        crops: Number of crops of each image whose probabilities are averaged: 1 is the centre, 10 are the corners and
            the centre, each of them also mirrored, and 144 are the paper's, at four scales.
        json: Print one line of JSON: {"data", "weights", "crops", "image_size", "unreadable", "count", "top1", "top5",
            "balanced_accuracy", "classes": {name: {"count", "top1"}}}.
        confusion: Draw the confusion matrix to this .png file. Class names that no installed font can draw are
            replaced by numbers.
        batch_size: Number of crops to compute at once.
    """
    require_training_packages()
    if len(inputs) < 2:
        raise UsageError(_ORDER)
    *paths, data = inputs
    for path in paths:
        if Path(path).is_dir() and not is_pretrained(path):
            raise UsageError(f"{path} is a folder: {_ORDER}")
    if data != "digits" and Path(data).is_file():
        raise UsageError(f"{data} is a file: {_ORDER}")
    require_batch_size(batch_size)
    if confusion:
        require_picture(confusion)

    import time

    from jax import numpy as jnp
    from rich.progress import BarColumn, TextColumn

    from flax_googlenet.evaluation.confusion import Score, draw_confusion
    from flax_googlenet.evaluation.ensembles import answers, image_size, make_networks
    from flax_googlenet.images.files import display_name
    from flax_googlenet.inference.compiling import require_backend, use_compilation_cache
    from flax_googlenet.training.history import last_training
    from flax_googlenet.training.splits import find_data
    from flax_googlenet.weights.checkpoint import load_weights

    use_compilation_cache()
    require_backend()
    messages = Messages()
    ensemble = {path: load_weights(weights_file(path, messages), dtype=jnp.float32) for path in paths}
    if random := [path for path, weights in ensemble.items() if weights.metadata.get("source") == "random"]:
        messages.warn(f"the weights of {', '.join(random)} are random: the figures mean nothing")
    size = image_size(ensemble)
    dataset, notes = find_data(data, [last_training(path, weights.metadata) for path, weights in ensemble.items()])
    networks, match = make_networks(ensemble, dataset.class_names, data)
    for note in (*dataset.notes, *match.notes, *notes):
        messages.note(note)

    score, start = Score(match.labels, len(dataset.class_names)), time.perf_counter()
    columns = BarColumn(20), TextColumn("{task.completed}/{task.total} images, {task.description}")
    with messages.progress(*columns) as progress:
        task = progress.add_task("", total=len(dataset))
        for indices, probabilities in answers(networks, dataset, crops, size, batch_size, messages.fail):
            score.add(dataset.labels[indices], probabilities)
            rate = score.count / (time.perf_counter() - start)
            text = f"{rate:.1f} images/s, top-1 {score.top1:.2%}"
            progress.update(task, completed=score.count + messages.failed, description=text)
    seconds = time.perf_counter() - start
    if not score.count:
        raise CommandError(f"{data}: none of the {len(dataset)} images can be read")
    messages.failed += dataset.unreadable

    figures = _figures(score, dataset.class_names)
    if json:
        named = {"data": display_name(data), "weights": [display_name(path) for path in paths]}
        content = {**named, "crops": crops, "image_size": size, "unreadable": messages.failed, **figures}
        write_output(dumps(content) + "\n")
    else:
        printed = {"top-1": score.top1, "top-5": score.top5, "balanced accuracy": score.balanced_accuracy}
        if len(match.labels) <= 5:
            del printed["top-5"]  # it is always right
        write_output("".join(f"{name:17} {value:7.2%}\n" for name, value in printed.items()))
    if empty := [name for name, found in figures["classes"].items() if not found["count"]]:
        messages.note(f"no image is evaluated of the class{'es' * (len(empty) > 1)} {listing(map(repr, empty))}")
    if confusion:
        with writing(confusion):
            numbered = draw_confusion(confusion, score.matrix, dataset.class_names)
        messages.warn_of_undrawable_names(confusion, numbered)
    return messages.conclude(score.count, seconds)


def _figures(score: "Score", class_names: tuple[str, ...]) -> dict[str, Any]:
    counts, right = score.matrix.sum(1), score.matrix.diagonal()
    classes = {
        name: {"count": int(count), "top1": int(hits) / int(count) if count else None}
        for name, count, hits in zip(class_names, counts, right, strict=True)
    }
    return {
        "count": score.count,
        "top1": score.top1,
        "top5": score.top5,
        "balanced_accuracy": score.balanced_accuracy,
        "classes": classes,
    }
