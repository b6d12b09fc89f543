"""Score any number of images with Ray Data: a row of Parquet for each of them.

    pip install -e ".[ray]"
    python examples/score_with_ray.py photos/ scores --weights imagenet

SOURCE is a folder, the URL of one in an object store (s3://bucket/photos), or a Parquet file or folder of them whose
name ends in .parquet, with the column path, or with image and bytes. OUTPUT, a folder or a URL, gets the rows in
OUTPUT/rows. The same command continues after a stop, and adds the rows of images that are new.

On a cluster, set RAY_ADDRESS, and name a SOURCE, an OUTPUT and weights that every machine can reach.
"""

import json
import os
import sys
from collections import Counter
from urllib.parse import quote

import pyarrow
import pyarrow.dataset
import ray
import tyro
from pyarrow import compute, fs, parquet
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from flax_googlenet import BatchPredictor, decode_batch
from flax_googlenet.errors import listing
from flax_googlenet.images.files import describe_unreadable, display_name, find_images, is_hidden, is_image
from flax_googlenet.weights.checkpoint import load_weights
from flax_googlenet.weights.pretrained import PRETRAINED, pretrained_file


def score(
    source: tyro.conf.Positional[str],
    output: tyro.conf.Positional[str],
    /,
    *,
    weights: str = "imagenet",
    top: int = 5,
    stage: str | None = None,
    workers: int | None = None,
    rows_per_file: int = 1024,
) -> None:
    """Write a row with the classes or features of each image, or with the reason why it cannot be read.

    Args:
        source: Folder of images, URL of one, or Parquet file.
        output: Folder or URL for the rows.
        weights: File of weights, or imagenet or bvlc.
        top: Number of classes in a row.
        stage: Stage whose features the rows have in place of the classes, such as avgpool.
        workers: Number of workers with a network, by default one for each GPU, or else for each machine.
        rows_per_file: Number of rows in a file of OUTPUT/rows. A stop loses the files that are not complete, one or a
            few for each worker.
    """
    filesystem, folder = fs.FileSystem.from_uri(location(output))
    filesystem.create_dir(folder)
    loaded = load_weights(pretrained_file(weights) if weights in PRETRAINED else os.path.abspath(weights))
    require_same_run(filesystem, f"{folder}/run.json", {"weights": loaded.digest, "top": top, "stage": stage})

    images = list_images(source)
    if not len(images):
        sys.exit(f"{source} has no images")
    if compute.count_distinct(images["image"]).as_py() < len(images):
        sys.exit(f"{source} has two images with the same name: give each its own")
    images_file, images_filesystem = f"{folder}/images.parquet", filesystem
    if "path" in images.column_names:
        parquet.write_table(images, images_file, filesystem=filesystem)
    else:
        images_filesystem, images_file = fs.FileSystem.from_uri(location(source))

    # A row counts as done when its file is complete. The names of these rows are in OUTPUT/done, which the next run
    # reads. The list of images has no pixels, so that images with a row are not read again.
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="image",
        checkpoint_path=f"{folder}/done",
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
    )
    rows = ray.data.read_parquet(images_file, filesystem=images_filesystem)
    rows = rows.repartition(target_num_rows_per_block=rows_per_file, strict=True)
    batch_size = min(256, rows_per_file)  # a larger batch would make a larger file
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:  # a GPU is faster than the cores beside it can decode: those of all machines do
        rows = rows.map_batches(decode_batch, batch_size=batch_size, fn_kwargs={"size": loaded.image_size})
    rows = rows.map_batches(
        BatchPredictor,
        fn_constructor_args=[weights if weights in PRETRAINED else os.path.abspath(weights)],
        fn_constructor_kwargs={"top": top, "stage": stage, "batch_size": 256 if gpus else 32},
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=workers or gpus or sum(node["Alive"] for node in ray.nodes())),
        num_gpus=1 if gpus else 0,
        num_cpus=0,  # XLA uses all cores anyway; a reservation would take them from reading and writing
    )
    rows.write_parquet(f"{folder}/rows", filesystem=filesystem)


def location(path: str) -> str:
    """Return a URL as it is, and the path of a folder or file as an absolute one."""
    return path if "://" in path else os.path.abspath(path)


def require_same_run(filesystem: fs.FileSystem, path: str, run: dict[str, object]) -> None:
    """Exit if the output has rows of other weights, or other rows."""
    if not filesystem.get_file_info(path).size:  # no such file, or an empty one of a run that was killed here
        with filesystem.open_output_stream(path) as file:
            file.write(json.dumps(run).encode())
    with filesystem.open_input_stream(path) as file:
        before = json.loads(file.read())
    if before != run:
        sys.exit(f"{path} says that the output was made with {before}, not {run}: name another output")


def list_images(source: str) -> pyarrow.Table:
    """Return the names of the images, in the column image, and their paths if they are not in the source themselves."""
    if source.partition("?")[0].rstrip("/").endswith(".parquet"):
        filesystem, path = fs.FileSystem.from_uri(location(source))
        dataset = pyarrow.dataset.dataset(path, filesystem=filesystem)
        columns = dataset.schema.names
        if "path" not in columns and not {"image", "bytes"} <= {*columns}:
            sys.exit(f"{source} needs the column path, or image and bytes, and has {listing(columns)}")
        table = dataset.to_table([name for name in ("image", "path") if name in columns])
        return table if "image" in table.column_names else table.append_column("image", table["path"])
    if "://" in source:
        filesystem, root = fs.FileSystem.from_uri(source)
        files = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        names = [file.path.removeprefix(root).strip("/") for file in files if file.type == fs.FileType.File]
        names = [name for name in names if is_image(name) and not any(map(is_hidden, name.split("/")))]
        url, question_mark, query = source.partition("?")
        urls = [f"{url.rstrip('/')}/{quote(name)}" for name in names]
        return pyarrow.table({"image": urls, "path": [f"{url}{question_mark}{query}" for url in urls]})
    unreadable = Counter[str]()
    paths = list(find_images([source], sys.exit, unreadable))
    if unreadable:
        print(f"{source}: {describe_unreadable(unreadable)}", file=sys.stderr)
    # In bytes, because the name of a file need not be UTF-8.
    return pyarrow.table(
        {
            "image": [display_name(path) for path in paths],
            "path": [os.fsencode(os.path.abspath(path)) for path in paths],
        }
    )


if __name__ == "__main__":
    tyro.cli(score)
