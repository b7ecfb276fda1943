"""The one exception that the command line turns into exit code 2."""

from __future__ import annotations


class UsageError(Exception):
    """Something the user can mend: an option, a path, a column, an empty file. The text says what and how."""
