"""The output of ``flax-googlenet classify``: a file that holds whole rows whatever happens, and goes on in a rerun.

A row is ``{"image": path, "predictions": [{"index", "label", "probability"}, ...], "weights": digits}``, the likeliest
class first. ``.jsonl`` and ``.parquet`` have it as it is; ``.csv`` has the columns image, index1, label1, probability1,
index2, ..., weights. ``weights`` are the first digits of the sha256 of their file: rows of different weights, or of
different numbers of predictions, are never mixed.

In a ``.csv``, control characters are escaped, and an apostrophe stands in front of text that a spreadsheet would take
for a formula (https://owasp.org/www-community/attacks/CSV_Injection).

Rows are appended and synced batch by batch. A kill can cut off the last row: the next run removes what is left of it.
Parquet cannot grow, so its rows wait as JSON lines in ``FILE.parquet.part`` for the end of the run.
"""

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.errors import install_advice, printable
from flax_googlenet.files import lock, write_atomically

SUFFIXES = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]

_FORMULA = re.compile("'*[=+@\uff1d\uff0b\uff0d\uff20-]")
"""The start of a cell that a spreadsheet would calculate, full-width signs of Chinese and Japanese included.

It also matches after apostrophes: a name that begins with one and then such a sign gets a second one, so that ``_text``
never removes an apostrophe that belongs to the name.
"""

_MAX_LINE_BYTES = 2**26  # a row of all 21,841 classes of ImageNet has a few million


class _OtherRowsError(Exception):
    """A file that is there holds rows which those of this run must not be mixed with; says which."""


class Results:
    """The rows of one output, appended to an open file."""

    def __init__(self, file: BinaryIO, *, is_csv: bool, weights: str, top: int) -> None:
        self._done: set[str] = set()
        self._file, self._is_csv, self._weights, self._top = file, is_csv, weights, top

    def claim(self, image: str) -> bool:
        """Returns whether an image is still to be done: it has no row, and was not asked for before."""
        name = printable(image)  # as a .csv has it
        is_new = name not in self._done
        self._done.add(name)
        return is_new

    def append(self, rows: list[Row]) -> None:
        """Writes rows, which have no ``weights`` yet, and syncs them to the disk; a CommandError names the file."""
        rows = [row | {"weights": self._weights} for row in rows]
        self._write(_csv(map(_flat, rows)) if self._is_csv else _json(rows))

    def _write(self, data: bytes) -> None:
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[os.write(self._file.fileno(), data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CommandError(Status.NOT_DONE, f"cannot write {self._file.name}: {error.strerror}") from error

    def admit(self, rows: Iterable[Row]) -> None:
        """Counts rows as done; raises if they are not of these weights and this number of predictions."""
        for row in rows:
            if row["weights"] != self._weights:
                raise _OtherRowsError("it was made with other weights")
            if len(row["predictions"]) != self._top:
                raise _OtherRowsError(f"it was made with --top {len(row['predictions'])}")
            self._done.add(printable(row["image"]))

    def recover(self) -> None:
        """Admits the rows of the file, and removes what a kill has left behind the last whole one."""
        header = _csv([_columns(self._top)]) if self._is_csv else b""
        end = 0
        self._file.seek(0)
        for row, row_end in _csv_rows(self._file, self._top) if self._is_csv else _json_rows(self._file):
            self.admit([] if row is None else [row])
            end = row_end
        if end == 0:  # new, or cut off in its first line
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
    """Opens an output, or makes it, and locks it against other runs.

    Args:
        path: the file, with one of ``SUFFIXES``.
        weights: what the rows have as ``weights``.
        top: the number of predictions in a row.
        warn: takes the warning that the file system has no locks.

    Raises:
        CommandError: if it holds anything but rows of these weights and this number, or another run is writing it.
        OSError: if it cannot be written.
    """
    is_parquet = path.suffix == ".parquet"
    growing = path.with_name(f"{path.name}.part") if is_parquet else path
    if is_parquet:
        _require_pyarrow()
    for file_to_write in (path, growing):
        if file_to_write.exists() and not file_to_write.is_file():
            raise CommandError(Status.NOT_DONE, f"cannot write {file_to_write}: it is there and not a regular file")
    with growing.open("a+b") as file:
        results = Results(file, is_csv=path.suffix == ".csv", weights=weights, top=top)
        try:
            lock(file, warn)
            results.recover()
            if is_parquet and path.exists():
                results.admit(_parquet_rows(path))
        except BlockingIOError as error:
            raise CommandError(Status.NOT_DONE, f"another run is writing {growing}: wait for it") from error
        except (_OtherRowsError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
            if is_parquet and growing.stat().st_size == 0:
                growing.unlink()
            # The others are what the readers make of a file that is no output of this command, or is damaged.
            reason = error if isinstance(error, _OtherRowsError) else "it holds something else"
            message = f"{path} cannot be continued ({reason}): name another --output, or move it away"
            raise CommandError(Status.NOT_DONE, message) from error
        yield results
        if is_parquet:
            file.seek(0)
            try:
                _add_to_parquet(path, (row for row, _ in _json_rows(file)))
            except OSError as error:
                message = f"cannot write {path}: {error.strerror}; its rows are in {growing}, for the next run"
                raise CommandError(Status.NOT_DONE, message) from error
            growing.unlink()


def _json(rows: Iterable[Row]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _json_rows(file: BinaryIO) -> Iterator[tuple[Row, int]]:
    """Each whole row of a growing file, and where it ends."""
    end = 0
    for line in _whole_lines(file):
        end += len(line)
        yield _checked(json.loads(line)), end


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields each line of a growing file, without a last one that was cut off."""
    while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
        yield line
    if len(line) == _MAX_LINE_BYTES:
        raise ValueError(f"it has a line of {_MAX_LINE_BYTES} bytes or more")


def _checked(row: Any) -> Row:
    """Returns a row of a file that anybody may have written; raises ValueError, TypeError or KeyError for others."""
    predictions = row["predictions"]
    labels = [prediction["label"] for prediction in predictions if prediction["label"] is not None]
    "".join([row["image"], row["weights"], *labels]).encode()  # JSON can hold halves of surrogate pairs, UTF-8 cannot
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
    """Returns text that a spreadsheet shows, whatever it begins with; ``_text`` goes back."""
    text = printable(text)
    return f"'{text}" if _FORMULA.match(text) else text


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _csv_rows(file: BinaryIO, top: int) -> Iterator[tuple[Row | None, int]]:
    """The header, as None, and each whole row of a growing file, and where it ends. A row can have several lines."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in _whole_lines(file):
            end += len(line)
            yield line.decode()

    reader = csv.reader(lines())
    for columns in reader:
        if columns != _columns(top):
            other_top = (len(columns) - 2) // 3
            if columns == _columns(other_top):
                raise _OtherRowsError(f"it was made with --top {other_top}")
            raise ValueError("it has other columns")
        yield None, end
        for fields in reader:
            if len(fields) == len(columns):
                yield {"image": _text(fields[0]), "predictions": fields[1:-1:3], "weights": fields[-1]}, end
            elif next(reader, None) is not None:  # only the last row can be cut off
                raise ValueError(f"line {reader.line_num} has other columns")


def _require_pyarrow() -> None:
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        message = f"a .parquet file needs PyArrow: {install_advice('parquet')}; or name a .csv or .jsonl file"
        raise CommandError(Status.NOT_DONE, message) from error


def _parquet_schema() -> Any:
    import pyarrow

    prediction = {"index": pyarrow.int64(), "label": pyarrow.string(), "probability": pyarrow.float64()}
    return pyarrow.schema(
        {
            "image": pyarrow.string(),
            "predictions": pyarrow.list_(pyarrow.struct(prediction)),
            "weights": pyarrow.string(),
        }
    )


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
    """Adds the rows to the file. They may be in it already, after a kill between this and the end of the run."""
    import pyarrow
    from pyarrow import parquet

    schema = _parquet_schema()
    table = parquet.read_table(path) if path.exists() else schema.empty_table()
    known = set(table["image"].to_pylist())
    new = pyarrow.Table.from_pylist([row for row in rows if row["image"] not in known], schema)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.concat_tables([table, new]), buffer)
    write_atomically(path, buffer.getvalue())
