"""Open a subject, and take its snapshot or see what it does where a snapshot looks."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmconform.session import versions
from lmconform.snapshots import FINGERPRINT_VERSION, drawing, speed
from lmconform.snapshots.fingerprint import Measured, choose_tokens, fingerprint, measure
from lmconform.snapshots.inventory import Inventory, config_of, hash_of
from lmconform.snapshots.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmconform.specimen import Specimen
    from lmconform.subject import Subject


@dataclass
class Observed:
    """What a subject does now, measured as a snapshot was."""

    measured: Measured
    deal: drawing.Deal
    inventory: Inventory
    config: dict[str, Any]
    provenance: dict[str, Any]
    speed: dict[str, float]
    computed_in: str


def take(
    subject: Subject, *, seed: int = 0, as_loaded: bool = False, announce: Callable[[str], None] = print
) -> Snapshot:
    """A snapshot of the subject as it is. Raises BuildError or SnapshotError."""
    native, exact = _opened(subject, seed, announce)
    tokens = choose_tokens(exact, seed)
    slots = drawing.make_slots(exact, lambda: exact.logits(exact.probe_ids()))
    made = drawing.deal(slots, exact.module, [slot.names for slot in slots])
    config = config_of(native.module)
    return Snapshot(
        subject.name, subject.spec or subject.name, seed, as_loaded, _dtype(exact), _provenance(native, config),
        speed.ratios(native, tokens.batch), config, Inventory.of(native.module), slots, tokens,
        fingerprint(exact, tokens, made, seed=seed, as_loaded=as_loaded),
    )  # fmt: skip


def observe(subject: Subject, snapshot: Snapshot, *, announce: Callable[[str], None] = print) -> Observed:
    """The same measured on the subject as it is now, under the snapshot's weights and tokens. Raises BuildError."""
    native, exact = _opened(subject, snapshot.seed, announce)
    highest = int(max(np.max(snapshot.tokens.batch), np.max(snapshot.tokens.long)))
    measured = Measured(missing={"batch": f"the vocabulary has {exact.vocab_size} entries, and token {highest} is fed"})
    order = drawing.by_use(exact.module, lambda: exact.logits(exact.probe_ids()))
    made = drawing.deal(snapshot.slots, exact.module, order)
    if highest < exact.vocab_size:
        measured = measure(exact, snapshot.tokens, made, seed=snapshot.seed, as_loaded=snapshot.as_loaded)
    config = config_of(native.module)
    return Observed(
        measured, made, Inventory.of(native.module), config, _provenance(native, config),
        speed.ratios(native, snapshot.tokens.batch) if highest < exact.vocab_size else {}, _dtype(exact),
    )  # fmt: skip


def _opened(subject: Subject, seed: int, announce: Callable[[str], None]) -> tuple[Specimen, Specimen]:
    """The subject in its own dtype, and in float64 (in its own, where it does not run in float64)."""
    native = subject.open(seed=seed, as_loaded=True, announce=announce)
    return native, native.whole_twin() or native.copy()


def _dtype(specimen: Specimen) -> str:
    return str(specimen.dtype).removeprefix("torch.")


def _provenance(native: Specimen, config: dict[str, Any]) -> dict[str, Any]:
    import torch

    kind = type(native.module)
    place = kind.__module__
    found = {name: version for name, version in versions().items() if name != "hypothesis"}
    return {
        **found,
        "fingerprint": FINGERPRINT_VERSION,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "class": kind.__qualname__ if place.startswith("_lmconform_") else f"{place}.{kind.__qualname__}",
        "dtype": _dtype(native),
        "config": hash_of(config) if config else "none",
    }
