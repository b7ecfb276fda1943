"""`python -m lmconform` is the command `lmconform`; under torchrun all processes run it, and the first one reports."""

from __future__ import annotations

import contextlib
import os
import sys

from lmconform.cli import main
from lmconform.measuring.ranks import WRITING, follows, under_torchrun


def run() -> int:
    """A process that only takes part prints nothing, writes no files, and leaves the verdict to the first one.

    Under torchrun the profile is thorough unless stated: the family `distributed` belongs to it.
    """
    arguments = list(sys.argv[1:])
    if under_torchrun() and arguments[:1] == ["check"] and not any(w.startswith("--profile") for w in arguments):
        arguments += ["--profile", "thorough"]
    if not follows():
        return main(arguments)
    for option in WRITING:
        while option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
        arguments = [word for word in arguments if not word.startswith(option + "=")]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
