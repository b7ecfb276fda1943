"""Behaviour fingerprints of a subject, kept in a file and compared with what the subject does later.

`drawing` gives the weights, `fingerprint` measures, `last_bits` says how far rounding alone can move each figure,
`store` keeps it all in one file, `comparison` says what changed, where first and how much, `command` is the command
line. Importing this imports neither torch nor a subject.
"""

from __future__ import annotations

FINGERPRINT_VERSION = 2  # of what is measured; figures of two versions are not compared


class SnapshotError(Exception):
    """A snapshot cannot be taken, read or compared; one line says why and what to do (exit code 2)."""
