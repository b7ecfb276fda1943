"""`lmconform report`: HTML pages of JSON reports that were written earlier, or elsewhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lmconform.options import OptionError, require_writable
from lmconform.results import SCHEMA_VERSION, Report, write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform report`."""
    parser.description = "Make one HTML page of what --json wrote: of check (several files: one page), or of zoo."
    parser.add_argument("files", nargs="+", metavar="FILE", help="a JSON report of check, of pytest --lm, or of zoo")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the page to write")


def main(args: argparse.Namespace) -> int:
    """Exit code 0: the page was written, whatever it says. Raises OptionError for files that are no reports."""
    from lmconform.report.html import render, render_zoo, require_libraries

    require_libraries()
    require_writable(args.output)
    read = {name: _read(name) for name in args.files}
    zoos = [name for name, entries in read.items() if any("rows" in entry for entry in entries)]
    if zoos and len(read) > 1:
        raise OptionError(f"{zoos[0]} is a zoo's report: it makes a page of its own, so name it alone")
    try:
        page = (
            render_zoo(read[zoos[0]][0])
            if zoos
            else render([Report.from_dict(entry) for entries in read.values() for entry in entries])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{', '.join(read)}: no whole report ({type(error).__name__}: {error})") from error
    write_whole(args.output, page)
    return 0


def _read(name: str) -> list[dict[str, Any]]:
    """The reports in a file. Raises OptionError."""
    try:
        data = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OptionError(f"{name} is no JSON: {error}") from error
    entries = data if isinstance(data, list) else [data]
    for entry in entries:
        if not isinstance(entry, dict) or "schema_version" not in entry or not {"results", "rows"} & set(entry):
            raise OptionError(
                f"{name} is no report of lmconform check --json, pytest --lm-json or lmconform zoo --json"
            )
        if entry["schema_version"] > SCHEMA_VERSION:
            raise OptionError(
                f"{name} has schema {entry['schema_version']}, this lmconform reads up to {SCHEMA_VERSION}: "
                "make the page with the version that wrote it"
            )
    return entries
