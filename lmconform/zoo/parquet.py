"""The rows of a run as a Parquet file, for those who keep many runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.options import OptionError
from lmconform.zoo.rows import Row

if TYPE_CHECKING:
    import pyarrow

NESTED = ("messages", "repro", "counts", "timings")  # keys differ from row to row: kept as JSON text


def writable(path: Path) -> None:
    """Raises OptionError where the file cannot be written, before minutes are spent."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OptionError(f"--parquet needs pyarrow: pip install 'lmconform[ray]' ({error})") from error
    if path.is_dir():
        raise OptionError(f"--parquet {path}: is a directory")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(f"--parquet {path}: cannot write into {path.parent}")


def schema() -> pyarrow.Schema:
    """The columns, the same for every run, so that files of many runs can be read as one."""
    import pyarrow

    kinds = {
        "str": pyarrow.string(), "bool": pyarrow.bool_(), "float": pyarrow.float64(),
        "float | None": pyarrow.float64(), "list[str]": pyarrow.list_(pyarrow.string()),
    }  # fmt: skip
    return pyarrow.schema(
        (field.name, pyarrow.string() if field.name in NESTED else kinds[str(field.type)]) for field in fields(Row)
    )


def write_parquet(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """One record a type, whole or not at all; what the run depended on stands in the file's metadata as `lmconform`."""
    import pyarrow
    from pyarrow import parquet

    records = [
        {name: json.dumps(value) if name in NESTED else value for name, value in row.to_dict().items()} for row in rows
    ]
    table = pyarrow.Table.from_pylist(records, schema=schema())
    table = table.replace_schema_metadata({"lmconform": json.dumps(run)})
    part = path.with_name(path.name + ".part")
    parquet.write_table(table, part)
    part.replace(path)
