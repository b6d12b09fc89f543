"""The output file of ``flax-googlenet classify``, which survives kills, and which the next run continues.

A row is ``{"image": path, "predictions": [{"index", "label", "probability"}, ...], "weights": digits}``, with the
likeliest class first. ``.jsonl`` and ``.parquet`` files have the rows in this form; ``.csv`` has the columns image,
index1, label1, probability1, index2, ..., weights. ``weights`` holds the first digits of the sha256 of the file of
weights: rows of different weights, or with different numbers of predictions, are never mixed.

In a ``.csv`` file, control characters are escaped, and an apostrophe stands in front of text that a spreadsheet would
take for a formula (https://owasp.org/www-community/attacks/CSV_Injection).

Rows are appended and synced batch by batch. A kill can cut off the last row; the next run removes what is left of it.
Parquet files cannot grow, so the rows wait as JSON lines in ``FILE.parquet.part`` until the run ends.
"""

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flax_googlenet.commands.status import CommandError
from flax_googlenet.commands.terminal import writing
from flax_googlenet.errors import install_advice, printable
from flax_googlenet.files import lock, require_replaceable, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

SUFFIXES = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]

_FORMULA = re.compile("'*[=+@\uff1d\uff0b\uff0d\uff20-]")
"""The start of a cell that a spreadsheet would calculate, with the full-width signs of Chinese and Japanese.

Apostrophes may come first: a name that begins with an apostrophe and such a sign gets a second apostrophe, so that
``_text`` never removes one that belongs to the name.
"""

_MAX_LINE_BYTES = 2**26  # a row of all 21,841 classes of ImageNet has a few million


class _OtherRowsError(Exception):
    """An existing file holds rows that must not be mixed with those of this run; the message says why."""


def rank(
    probabilities: "Float64[np.ndarray, 'num_classes']", top: int, class_names: Sequence[str] | None
) -> list[dict[str, int | str | float | None]]:
    """Return the predictions of a row: the ``top`` likeliest classes, the likeliest first."""
    return [
        {
            "index": int(index),
            "label": class_names[index] if class_names else None,
            "probability": float(f"{probabilities[index]:.6g}"),  # the logits are float32
        }
        for index in (-probabilities).argsort(kind="stable")[:top]
    ]


class Results:
    """The rows of an output file, which is open and grows."""

    def __init__(self, file: BinaryIO, *, is_csv: bool, weights: str, top: int) -> None:
        self.skipped = 0
        """The number of images that ``claim`` refused."""
        self._done: set[str] = set()
        self._file, self._is_csv, self._weights, self._top = file, is_csv, weights, top

    def claim(self, image: str) -> bool:
        """Return whether an image is still to be classified, because it has no row and was not claimed before."""
        name = printable(image)  # as a .csv file writes it
        is_new = name not in self._done
        self._done.add(name)
        self.skipped += not is_new
        return is_new

    def append(self, rows: list[Row]) -> None:
        """Write rows, which have no ``weights`` yet, and sync them to the disk.

        Raises:
            CommandError: If they cannot be written. The message names the file.
        """
        rows = [row | {"weights": self._weights} for row in rows]
        if self._is_csv:
            self._write(_csv(map(_flat, rows)))
        else:
            self._write("".join(f"{json.dumps(row)}\n" for row in rows).encode())

    def _write(self, data: bytes) -> None:
        with writing(self._file.name):
            while data:  # a disk that is nearly full takes only a part
                data = data[os.write(self._file.fileno(), data) :]
            os.fsync(self._file.fileno())

    def admit(self, rows: Iterable[Row]) -> None:
        """Count the images of existing rows as done; raise an _OtherRowsError unless they can be mixed with ours."""
        for row in rows:
            if row["weights"] != self._weights:
                raise _OtherRowsError("it was made with other weights")
            if len(row["predictions"]) != self._top:
                raise _OtherRowsError(f"it was made with --top {len(row['predictions'])}")
            self._done.add(printable(row["image"]))

    def recover(self) -> None:
        """Admit the existing rows of the file, and remove what a kill has left after the last complete row."""
        header = _csv([_columns(self._top)]) if self._is_csv else b""
        end = 0
        self._file.seek(0)
        for row in _csv_rows(self._file, self._top) if self._is_csv else _json_rows(self._file):
            self.admit([] if row is None else [row])
            end = self._file.tell()
        if end == 0:  # the file is new, or was cut off in its first line
            start = header or b'{"image": "'
            self._file.seek(0)
            if not start.startswith(self._file.read(len(start))):
                raise ValueError("it holds something else")
        self._file.truncate(end)
        if end == 0:
            self._write(header)


@contextmanager
def open_results(
    path: Path, weights: str, top: int, warn: Callable[[str], object] = warnings.warn
) -> Iterator[Results]:
    """Open or create an output file, and lock it against other runs.

    Args:
        path: The file, whose name ends in one of ``SUFFIXES``.
        weights: The digits that the rows have as ``weights``.
        top: Number of predictions in a row.
        warn: Takes the warning that the file system has no locks.

    Raises:
        CommandError: If the file holds anything but rows of these weights with this number of predictions, or another
            run is writing it.
        OSError: If it cannot be written.
    """
    is_parquet = path.suffix == ".parquet"
    growing = path.with_name(f"{path.name}.part") if is_parquet else path
    if is_parquet and find_spec("pyarrow") is None:
        message = f"a .parquet file needs PyArrow: {install_advice('parquet')}; or name a .csv or .jsonl file"
        raise CommandError(message)
    for file_to_write in (path, growing):
        with writing(file_to_write):
            require_replaceable(file_to_write)
    with growing.open("a+b") as file:
        results = Results(file, is_csv=path.suffix == ".csv", weights=weights, top=top)
        try:
            lock(file, warn)
            results.recover()
            if is_parquet and path.exists():
                results.admit(_parquet_rows(path))
        except BlockingIOError as error:
            raise CommandError(f"another run is writing {growing}: wait for it") from error
        except (_OtherRowsError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
            if is_parquet and growing.stat().st_size == 0:
                growing.unlink()
            # The other exceptions are those of readers that meet a damaged file, or one that another program wrote.
            reason = error if isinstance(error, _OtherRowsError) else "it holds something else"
            message = f"{path} cannot be continued ({reason}): name another --output, or move it away"
            raise CommandError(message) from error
        yield results
        if is_parquet:
            file.seek(0)
            try:
                _add_to_parquet(path, _json_rows(file))
            except OSError as error:
                message = f"cannot write {path}: {error.strerror}; its rows are in {growing} for the next run"
                raise CommandError(message) from error
            growing.unlink()


def _json_rows(file: BinaryIO) -> Iterator[Row]:
    """Yield each complete row of a growing file."""
    for line in _whole_lines(file):
        yield _checked(json.loads(line))


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each complete line of a growing file, whose position is then the end of that line."""
    while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
        yield line
    if len(line) == _MAX_LINE_BYTES:
        raise ValueError(f"it has a line of {_MAX_LINE_BYTES} bytes or more")


def _checked(row: Any) -> Row:
    """Return a row that anybody may have written; raise ValueError, TypeError or KeyError if it is not one of ours."""
    predictions = row["predictions"]
    labels = [prediction["label"] for prediction in predictions if prediction["label"] is not None]
    "".join([row["image"], row["weights"], *labels]).encode()  # JSON can hold surrogates, UTF-8 cannot
    numbers = [number for prediction in predictions for number in (prediction["index"], prediction["probability"])]
    if not all(type(number) in (int, float) and 0 <= number < 2**31 for number in numbers):
        raise ValueError("it has an index or a probability of another kind")
    return row


def _csv(rows: Iterable[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _columns(top: int) -> list[str]:
    ranked = [f"{name}{rank}" for rank in range(1, top + 1) for name in ("index", "label", "probability")]
    return ["image", *ranked, "weights"]


def _flat(row: Row) -> list[Any]:
    ranked = (
        value
        for prediction in row["predictions"]
        for value in (prediction["index"], _cell(prediction["label"] or ""), prediction["probability"])
    )
    return [_cell(row["image"]), *ranked, row["weights"]]


def _cell(text: str) -> str:
    """Return the cell that a spreadsheet shows as this text, whatever it begins with; ``_text`` is the inverse."""
    text = printable(text)
    return f"'{text}" if _FORMULA.match(text) else text


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _csv_rows(file: BinaryIO, top: int) -> Iterator[Row | None]:
    """Yield the header, as None, and each complete row. A row can have several lines."""
    reader = csv.reader(map(bytes.decode, _whole_lines(file)))
    for columns in reader:
        if columns != _columns(top):
            other_top = (len(columns) - 2) // 3
            if columns == _columns(other_top):
                raise _OtherRowsError(f"it was made with --top {other_top}")
            raise ValueError("it has other columns")
        yield None
        for fields in reader:
            if len(fields) == len(columns):
                yield {"image": _text(fields[0]), "predictions": fields[1:-1:3], "weights": fields[-1]}
            elif next(reader, None) is not None:  # only the last row can be cut off
                raise ValueError(f"line {reader.line_num} has other columns")


def _parquet_schema() -> Any:
    import pyarrow

    text = pyarrow.string()
    prediction = pyarrow.struct({"index": pyarrow.int64(), "label": text, "probability": pyarrow.float64()})
    return pyarrow.schema({"image": text, "predictions": pyarrow.list_(prediction), "weights": text})


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if not file.schema_arrow.equals(_parquet_schema()):
                raise ValueError("it has other columns")
            table = file.read()
            table.validate(full=True)
            for batch in table.to_batches(2**16):
                yield from map(_checked, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:  # PyArrow's OSErrors about damage have no number
        if getattr(error, "errno", None):
            raise
        raise ValueError("it is damaged") from error


def _add_to_parquet(path: Path, rows: Iterable[Row]) -> None:
    """Add the rows to the file, except those that it already has from a run that was killed just before its end."""
    import pyarrow
    from pyarrow import parquet

    schema = _parquet_schema()
    table = parquet.read_table(path) if path.exists() else schema.empty_table()
    known = set(table["image"].to_pylist())
    new = pyarrow.Table.from_pylist([row for row in rows if row["image"] not in known], schema)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.concat_tables([table, new]), buffer)
    write_atomically(path, buffer.getvalue())
