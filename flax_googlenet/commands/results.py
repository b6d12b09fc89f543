"""The output file of ``flax-googlenet classify``, which survives kills, and which the next run continues.

A row is ``{"image": path, "predictions": [{"index", "label", "probability"}, ...], "weights": digits}``, with the
likeliest class first. ``.jsonl`` and ``.parquet`` files have the rows in this form; ``.csv`` has the columns image,
index1, label1, probability1, index2, ..., weights. ``weights`` holds the first digits of the sha256 of the file of
weights: rows of different weights, or with different numbers of predictions, are never mixed.

In a ``.csv`` file, control characters are escaped, and an apostrophe stands in front of text that a spreadsheet would
take for a formula (https://owasp.org/www-community/attacks/CSV_Injection).

The rows of a ``.parquet`` file wait as JSON lines in ``FILE.parquet.part`` until the run ends.
"""

import csv
import functools
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from flax_googlenet.commands.streaming import Growing, OtherContentsError, open_growing, open_parquet, whole_lines
from flax_googlenet.errors import printable
from flax_googlenet.files import write_atomically

SUFFIXES = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]

_FORMULA = re.compile("'*[=+@\uff1d\uff0b\uff0d\uff20-]")
"""The start of a cell that a spreadsheet would calculate, with the full-width signs of Chinese and Japanese.

Apostrophes may come first: a name that begins with an apostrophe and such a sign gets a second apostrophe, so that
``_text`` never removes one that belongs to the name.
"""


class Results(Growing):
    """The rows of an output file, which is open and grows."""

    def __init__(self, file: BinaryIO, *, is_csv: bool, weights: str, top: int) -> None:
        super().__init__(file)
        self._is_csv, self._weights, self._top = is_csv, weights, top

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

    def _admit(self, rows: Iterable[Row]) -> None:
        """Count the images of existing rows as done; raise an OtherContentsError unless they can be mixed with ours."""
        for row in rows:
            if row["weights"] != self._weights:
                raise OtherContentsError("it was made with other weights")
            if len(row["predictions"]) != self._top:
                raise OtherContentsError(f"it was made with --top {len(row['predictions'])}")
            self._done.add(printable(row["image"]))

    def recover(self) -> None:
        """Count the images of existing rows as done, and remove what a kill has left after the last complete row."""
        header = _csv([_columns(self._top)]) if self._is_csv else b""
        end = 0
        self._file.seek(0)
        for row in _csv_rows(self._file, self._top) if self._is_csv else _json_rows(self._file):
            self._admit([] if row is None else [row])
            end = self._file.tell()
        if end == 0:  # the file is new, or was cut off in its first line
            start = header or b'{"image": "'
            self._file.seek(0)
            if not start.startswith(self._file.read(len(start))):
                raise ValueError("it holds something else")
        self._file.truncate(end)
        if end == 0:
            self._write(header)

    def admit_packed(self, path: Path) -> None:
        """Count the images of a Parquet file as done."""
        self._admit(_parquet_rows(path))

    def pack(self, path: Path) -> None:
        """Add the rows to a Parquet file, except those that a run added before it was killed just before its end."""
        import pyarrow
        from pyarrow import parquet

        self._file.seek(0)
        schema = _parquet_schema()
        table = parquet.read_table(path) if path.exists() else schema.empty_table()
        known = set(table["image"].to_pylist())
        new = pyarrow.Table.from_pylist([row for row in _json_rows(self._file) if row["image"] not in known], schema)
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.concat_tables([table, new]), buffer)
        write_atomically(path, buffer.getvalue())


def open_results(
    path: Path, weights: str, top: int, warn: Callable[[str], object] = warnings.warn
) -> AbstractContextManager[Results]:
    """Open or create an output file as ``open_growing`` does, which also raises the same errors.

    Args:
        path: The file, whose name ends in one of ``SUFFIXES``. It must hold nothing but rows of these weights with this
            number of predictions.
        weights: The digits that the rows have as ``weights``.
        top: Number of predictions in a row.
        warn: Takes the warning that the file system has no locks.
    """
    make = functools.partial(Results, is_csv=path.suffix.lower() == ".csv", weights=weights, top=top)
    return open_growing(path, make, is_packed=path.suffix.lower() == ".parquet", warn=warn)


def _json_rows(file: BinaryIO) -> Iterator[Row]:
    """Yield each complete row of a growing file."""
    for line in whole_lines(file):
        yield _checked(json.loads(line))


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
    reader = csv.reader(map(bytes.decode, whole_lines(file)))
    try:
        for columns in reader:
            if columns != _columns(top):
                other_top = (len(columns) - 2) // 3
                if columns == _columns(other_top):
                    raise OtherContentsError(f"it was made with --top {other_top}")
                raise ValueError("it has other columns")
            yield None
            for fields in reader:
                if len(fields) == len(columns):
                    yield {"image": _text(fields[0]), "predictions": fields[1:-1:3], "weights": fields[-1]}
                elif next(reader, None) is not None:  # only the last row can be cut off
                    raise ValueError(f"line {reader.line_num} has other columns")
    except csv.Error as error:
        raise ValueError("it is no table") from error


def _parquet_schema() -> Any:
    import pyarrow

    from flax_googlenet.inference.predictor import predictions_type

    text = pyarrow.string()
    return pyarrow.schema({"image": text, "predictions": predictions_type(), "weights": text})


def _parquet_rows(path: Path) -> Iterator[Row]:
    with open_parquet(path) as file:
        if not file.schema_arrow.equals(_parquet_schema()):
            raise ValueError("it has other columns")
        table = file.read()
        table.validate(full=True)
        for batch in table.to_batches(2**16):
            yield from map(_checked, batch.to_pylist())
