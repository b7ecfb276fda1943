"""One snapshot, one file: JSON with a header for people, arrays in base64, and a digest over all of it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmconform.results import write_whole
from lmconform.snapshots import FINGERPRINT_VERSION, SnapshotError
from lmconform.snapshots.drawing import Slot
from lmconform.snapshots.fingerprint import Figures, Fingerprint, Tokens, scale_of
from lmconform.snapshots.inventory import Inventory

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "lmconform snapshot"
SCHEMA_VERSION = 1
_DTYPES = ("<f8", "<f4", "<i8")


@dataclass
class Snapshot:
    """What one subject did, and under which circumstances. `provenance` is for people, but for seed and as_loaded."""

    subject: str
    spec: str
    seed: int
    as_loaded: bool
    computed_in: str
    provenance: dict[str, Any]
    speed: dict[str, float]
    config: dict[str, Any]
    inventory: Inventory
    slots: list[Slot]
    tokens: Tokens
    behaviour: Fingerprint

    def write(self, path: str | os.PathLike[str]) -> None:
        """The file appears whole or not at all."""
        body = self._body()
        head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "digest": _digest(body)}
        write_whole(path, json.dumps({**head, **body}, indent=1, ensure_ascii=False) + "\n")

    def _body(self) -> dict[str, Any]:
        behaviour = self.behaviour
        greedy = behaviour.greedy
        return {
            "fingerprint_version": FINGERPRINT_VERSION,
            "subject": self.subject,
            "spec": self.spec,
            "seed": self.seed,
            "as_loaded": self.as_loaded,
            "computed_in": self.computed_in,
            "provenance": self.provenance,
            "speed": self.speed,
            "missing": behaviour.missing,
            "greedy": None if greedy is None else [" ".join(map(str, row)) for row in greedy.tolist()],
            "greedy_stable": behaviour.stable,
            "config": self.config,
            "inventory": self.inventory.to_dict(),
            "places": behaviour.places,
            "tokens": {"batch": _packed(self.tokens.batch, "<i8"), "long": _packed(self.tokens.long, "<i8")},
            "slots": [json.dumps(slot.to_dict()) for slot in self.slots],
            "figures": {
                key: {
                    "values": _packed(figures.values, "<f8"),
                    "exact": _packed(figures.exact, "<f4"),
                    "single": _packed(figures.single, "<f4"),
                }
                for key, figures in behaviour.keys.items()
            },
        }


def read(path: str | os.PathLike[str]) -> Snapshot:
    """Raises SnapshotError: one line that says what is wrong with the file."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SnapshotError(f"{file}: no such snapshot; lmconform snapshot SPEC -o {file} takes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise SnapshotError(
            f"{file}: no snapshot, or a damaged one (JSON ends in line {error.lineno}: {error.msg})"
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SnapshotError(f"{file}: JSON, but no lmconform snapshot")
    schema = data.get("schema_version")
    if schema != SCHEMA_VERSION:
        newer = isinstance(schema, int) and schema > SCHEMA_VERSION
        raise SnapshotError(
            f"{file}: written in schema {schema}, this lmconform reads {SCHEMA_VERSION}: "
            + ("upgrade lmconform" if newer else "take the snapshot anew")
        )
    body = {key: value for key, value in data.items() if key not in ("format", "schema_version", "digest")}
    if data.get("digest") != _digest(body):
        raise SnapshotError(
            f"{file}: edited or damaged (its digest does not fit); restore it, or delete it and take it anew"
        )
    if body["fingerprint_version"] != FINGERPRINT_VERSION:
        raise SnapshotError(
            f"{file}: holds fingerprint {body['fingerprint_version']}, this lmconform measures {FINGERPRINT_VERSION}: "
            "delete it and take it anew with a model known to be sound"
        )
    try:
        return _restored(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"{file}: not understood ({type(error).__name__}: {error})") from None


def _restored(body: dict[str, Any]) -> Snapshot:
    greedy = body["greedy"]
    keys = {}
    for key, packed in body["figures"].items():
        values, exact, single = (_unpacked(packed[name]).astype(np.float64) for name in ("values", "exact", "single"))
        keys[key] = Figures(values, scale_of(values), exact, single)
    return Snapshot(
        body["subject"], body["spec"], body["seed"], body["as_loaded"], body["computed_in"], body["provenance"],
        body["speed"], body["config"], Inventory(**body["inventory"]),
        [Slot.from_dict(json.loads(slot)) for slot in body["slots"]],
        Tokens(_unpacked(body["tokens"]["batch"]), _unpacked(body["tokens"]["long"])),
        Fingerprint(
            keys, body["places"],
            None if greedy is None else np.array([[int(token) for token in row.split()] for row in greedy]),
            body["greedy_stable"], body["missing"],
        ),
    )  # fmt: skip


def _packed(array: NDArray[Any], dtype: str) -> dict[str, Any]:
    data = np.ascontiguousarray(array.astype(dtype))
    return {
        "dtype": dtype,
        "shape": "x".join(map(str, data.shape)),
        "base64": base64.b64encode(data.tobytes()).decode(),
    }


def _unpacked(packed: dict[str, Any]) -> NDArray[Any]:
    if packed["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {packed['dtype']!r}")
    shape = [int(n) for n in packed["shape"].split("x")]
    return np.frombuffer(base64.b64decode(packed["base64"], validate=True), packed["dtype"]).reshape(shape).copy()


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
