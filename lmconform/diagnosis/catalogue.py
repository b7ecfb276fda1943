"""The catalogue of causes: lmconform/diagnosis/causes.toml."""

from __future__ import annotations

import difflib
import functools
import tomllib
from dataclasses import dataclass
from importlib import resources


class UnknownCause(LookupError):
    """No cause has that id."""


@dataclass(frozen=True)
class CauseEntry:
    """One cause. `shows` says which checks it turns red (always, often, sometimes), `spares` which it leaves green."""

    id: str
    summary: str
    explanation: str
    confirm: str
    mend: str
    references: tuple[str, ...]
    shows: dict[str, str]
    spares: frozenset[str]
    similar: tuple[str, ...]


@functools.cache
def catalogue() -> dict[str, CauseEntry]:
    """Every cause by id."""
    text = resources.files("lmconform.diagnosis").joinpath("causes.toml").read_text(encoding="utf-8")
    return {
        entry["id"]: CauseEntry(
            id=entry["id"],
            summary=entry["summary"],
            explanation=entry["explanation"],
            confirm=entry["confirm"],
            mend=entry["mend"],
            references=tuple(entry.get("references", ())),
            shows=dict(entry["shows"]),
            spares=frozenset(entry.get("spares", ())),
            similar=tuple(entry.get("similar", ())),
        )
        for entry in tomllib.loads(text)["cause"]
    }


def get_cause(id: str) -> CauseEntry:
    """The cause of that id. Raises UnknownCause, which suggests the nearest."""
    causes = catalogue()
    if id not in causes:
        near = difflib.get_close_matches(id, list(causes), n=3, cutoff=0.5)
        raise UnknownCause(f"no cause is called {id!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return causes[id]
