"""A snapshot against what the subject does now: what changed, where first, and how much.

A figure counts as changed where it moved further than FACTOR times what rounding every operation to float32 does to it
(measured when the snapshot was taken): then float32 itself would show it. What moved less, but more than the
computation's own rounding, is told and is no finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmconform.results import jsonable
from lmconform.snapshots.fingerprint import FORWARDS, broken
from lmconform.snapshots.last_bits import SINGLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmconform.snapshots.fingerprint import Figures
    from lmconform.snapshots.store import Snapshot
    from lmconform.snapshots.taking import Observed

FACTOR = 8.0
KINDS = ("behaviour", "inventory", "weights")
LISTED = 6
OTHER_WEIGHTS = "the numbers that run there are not the snapshot's (weights, above): that alone can be the cause"
UNTESTED = 0.01  # of a figure's size: where rounding alone moves it further than this, little is held


@dataclass
class Move:
    """How one key moved. `rows` are those beyond the bound; `size` is the largest move over the figure's size,
    `allowed` the bound there, `times` the largest move over its bound."""

    key: str
    rows: list[int]
    total: int
    worst: int
    size: float
    allowed: float
    times: float
    name: str = ""  # of the module that a state comes out of

    @property
    def changed(self) -> bool:
        return bool(self.rows)


@dataclass
class Finding:
    """One thing that changed. `kind` is one of KINDS."""

    kind: str
    message: str
    where: str = ""
    size: float | None = None
    allowed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: jsonable(value) for name, value in vars(self).items()}


@dataclass
class Comparison:
    """What the comparison came to. `ignored` are kinds that are told and do not count."""

    subject: str
    findings: list[Finding] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0
    ignored: tuple[str, ...] = ()

    @property
    def counted(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind not in self.ignored]

    @property
    def ok(self) -> bool:
        """Nothing that counts changed, and something was compared."""
        return self.compared > 0 and not self.counted

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "subject": self.subject,
            "ok": self.ok,
            "compared": self.compared,
            "ignored": list(self.ignored),
            "findings": [finding.to_dict() for finding in self.findings],
            "keys": [jsonable({**vars(move), "rows": len(move.rows)}) for move in self.moves],
            "notes": list(self.notes),
        }


def compare(snapshot: Snapshot, now: Observed, *, ignored: Iterable[str] = ()) -> Comparison:
    """Every key of the snapshot against the subject as it is."""
    found = Comparison(snapshot.subject, ignored=tuple(ignored))
    before = snapshot.behaviour
    measured = now.measured
    for key, figures in before.keys.items():
        case = key.partition("/")[0]
        current = measured.figures.get(key)
        if key.endswith("/modules"):
            continue  # says where inside a block; what a module is called or how many there are is nobody's promise
        if current is None or current.shape != figures.values.shape:
            if not (case in FORWARDS and key != f"{case}/logits"):  # the stream is told of as a whole, below
                _gone(found, key, case, measured.missing.get(case, ""), figures.values, current)
            continue
        found.compared += 1
        if key == "weights":  # what is gone is the inventory's to tell
            gone = [index for index, holder in enumerate(now.deal.holders) if holder is None]
            current = current.copy()
            current[gone] = figures.values[gone]
        move = _move(key, figures, current)
        if (index := key.partition("/")[2]).isdigit():
            move.name = before.places[case][int(index)]
        found.moves.append(move)
    _blocks(found, snapshot, now)
    _greedy(found, snapshot, now)
    unusable = {key.partition("/")[0] for key, values in measured.figures.items() if broken(values)}
    for case in before.missing:
        if case not in measured.missing and case not in unusable:
            found.findings.append(
                Finding(
                    "inventory", f"{case}: the subject can do it now, the snapshot does not hold it: renew it", case
                )
            )
    found.findings[:0] = [*_weights(found, snapshot), *_behaviour(found, snapshot, now)]
    found.findings += _inventory(snapshot, now)
    found.notes += _notes(found, snapshot, now)
    return found


def allowed(figures: Figures) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per row: beyond the first it is told, beyond the second it is a finding. Absolute."""
    eps = float(np.finfo(np.float64).eps)
    told = FACTOR * np.maximum(figures.exact, 8 * eps * figures.scale)
    return told, np.maximum(FACTOR * np.maximum(figures.single, SINGLE / 2 * figures.scale), told)


def _move(key: str, figures: Figures, current: NDArray[np.float64]) -> Move:
    difference = np.abs(current - figures.values)
    # a row that was and is NaN belongs to a parameter without numbers; one that became NaN has moved without bound
    same = np.isnan(current) & np.isnan(figures.values)
    moved = np.where(same, 0.0, np.nan_to_num(difference, nan=np.inf)).max(-1)
    _, bound = allowed(figures)
    beyond = np.flatnonzero(moved > bound)
    with np.errstate(invalid="ignore"):
        times = np.nan_to_num(moved / bound, nan=0.0)
    worst = int(times.argmax())
    return Move(
        key, beyond.tolist(), len(moved), worst, float(moved[worst] / figures.scale[worst]),
        float(bound[worst] / figures.scale[worst]), float(times[worst]),
    )  # fmt: skip


# -- behaviour ---------------------------------------------------------------------------------------------------------


def _behaviour(found: Comparison, snapshot: Snapshot, now: Observed) -> Iterator[Finding]:
    changed = {move.key: move for move in found.moves if move.changed and move.key != "weights"}
    if not changed:
        return
    where, key, hint = _first(changed, snapshot, now)
    move = changed[key]
    if key == "gradients":
        lines = [f"from the loss back, first {where}; {len(move.rows)} of {move.total} gradients moved"]
    else:
        lines = [
            f"first {where}, at {_place(key, min(move.rows), snapshot)}; {len(move.rows)} of {move.total} moved there"
        ]
    lines.append(
        f"by up to {move.size:.2g} of its size, at {_place(key, move.worst, snapshot)}: {_times(move.times)} the "
        f"{move.allowed:.2g} allowed"
        if np.isfinite(move.size)
        else f"to NaN or infinity, at {_place(key, move.worst, snapshot)}"
    )
    other = any(move.key == "weights" and move.changed for move in found.moves)
    causes = (OTHER_WEIGHTS,) if other else (hint, _pattern(changed, found, snapshot))
    lines += [said for said in (*causes, _uncarried(now)) if said]
    yield Finding("behaviour", "\n".join(lines), where, move.size, move.allowed)


def _times(value: float) -> str:
    return f"{value:.0f} times" if value >= 10 else f"{value:.1f} times"


def _first(changed: dict[str, Move], snapshot: Snapshot, now: Observed) -> tuple[str, str, str]:
    """Where, the key that shows it, and what is known of the place."""
    places = snapshot.behaviour.places
    for case in FORWARDS:
        if case in places and case in now.measured.places and len(places[case]) != len(now.measured.places[case]):
            logits = [key for key in changed if key.endswith("/logits")]
            if logits:
                return "in the logits (the number of blocks is another)", logits[0], ""
    states = {key: key.partition("/") for key in changed if key.partition("/")[2].isdigit()}
    if states:
        first = min(int(index) for _, _, index in states.values())
        at = [key for key, (_, _, index) in states.items() if int(index) == first]
        key = max(at, key=lambda key: changed[key].times)
        name = places[key.partition("/")[0]][first]
        if first == 0:
            return f"before the first block ({name})", key, "embedding, its scale, position table, or what they read"
        return f"in {name}, which is given what it was given before", key, _inside(at, name, snapshot, now)
    logits = [key for key in changed if key in [f"{case}/logits" for case in FORWARDS]]
    if logits:
        key = max(logits, key=lambda key: changed[key].times)
        case = key.partition("/")[0]
        if case in places:
            return f"after the last block ({places[case][-1]})", key, "final norm, head, or what is done to the logits"
        return "in the logits (no blocks were found)", key, ""
    for key, said in (
        ("padded/logits", "the same tokens without padding agree: look at mask and positions under padding"),
        ("positioned/logits", "without position_ids everything agrees: look at how given positions are used"),
        ("cached/logits", "without a cache everything agrees: look at positions, mask and order of cached steps"),
        ("loss", "logits agree: look at shift, mean and ignored labels of the model's own loss"),
    ):
        if key in changed:
            return f"in {key.replace('/', ' ')}", key, said
    rows = changed["gradients"].rows
    name = snapshot.slots[rows[-1]].names[0]
    return (
        f"in the gradient of {name}", "gradients",
        "logits agree and gradients do not: something is detached, computed under no_grad, or no longer tied",
    )  # fmt: skip


def _inside(keys: list[str], block: str, snapshot: Snapshot, now: Observed) -> str:
    """The first module inside the block whose output moved, and the last before it that did not."""
    quiet = False
    for case in sorted({key.partition("/")[0] for key in keys} & {"batch", "quiet"}):
        key = f"{case}/modules"
        old, current = snapshot.behaviour.keys.get(key), now.measured.figures.get(key)
        if old is None or current is None:
            continue
        rows = {name: row for row, name in enumerate(now.measured.places[key])}
        _, bound = allowed(old)
        agreed = ""
        for row, name in enumerate(snapshot.behaviour.places[key]):
            if not name.startswith(block + ".") or name not in rows:
                continue
            if bool(np.abs(current[rows[name]] - old.values[row]).max() > bound[row]):
                after = f"; {agreed}, which ends before it, agrees" if agreed else ""
                return f"inside it {name} is the first module whose output moved{after}"
            agreed = name
        quiet = quiet or bool(agreed)
    return (
        "every module inside it agrees: look at the block's own code (residual additions, their scale)" if quiet else ""
    )


def _pattern(changed: dict[str, Move], found: Comparison, snapshot: Snapshot) -> str:
    """What the cases say together."""
    forwards = {key: move for key, move in changed.items() if key.partition("/")[0] in FORWARDS}
    if not forwards:
        return ""
    largest = {
        case: max((m.size for m in found.moves if m.key.partition("/")[0] == case), default=0.0) for case in FORWARDS
    }
    if largest["quiet"] > 20 * max(largest["batch"], 1e-300):
        return "it grows as activations shrink: an epsilon (of a norm, of a division)"
    firsts = []
    for key, move in forwards.items():
        time = (snapshot.tokens.long if key.startswith("long/") else snapshot.tokens.batch).shape[1]
        firsts.append(min(row % time for row in move.rows))
    if min(firsts) > 0:
        agree = (
            f"positions 0 to {min(firsts) - 1} agree"
            if min(firsts) > 1
            else "position 0, which sees itself only, agrees"
        )
        return (
            f"{agree} in every case: look at what mixes or encodes positions "
            "(mask, window, position encoding, attention scale)"
        )
    return ""


def _uncarried(now: Observed) -> str:
    """Where drawn weights could not be dealt out again, a change says less."""
    gone = [s.names[0] for s, holder in zip(now.deal.slots, now.deal.holders, strict=True) if holder is None]
    if not gone and not now.deal.added:
        return ""
    names = [*gone, *(names[0] for names in now.deal.added)]
    return (
        f"beware: the snapshot's weights do not fit {_listed(names)} (other shapes, or another number of them), so the "
        "numbers that run there are others too; a snapshot --as-loaded of a converted checkpoint tells the two apart"
    )


def _place(key: str, row: int, snapshot: Snapshot) -> str:
    """'batch, row 1, position 7', 'gradients, blocks.0.norm.weight'."""
    case = key.partition("/")[0]
    if case in ("gradients", "weights"):
        return f"{case}, {snapshot.slots[row].names[0]}"
    if case == "loss":
        return case
    if case == "cached":
        steps = snapshot.behaviour.keys[key].values.shape[0] // snapshot.tokens.batch.shape[0]
        start = snapshot.tokens.batch.shape[1] - steps
        return f"{case}, row {row // steps}, position {start + row % steps}"
    time = (snapshot.tokens.long if case == "long" else snapshot.tokens.batch).shape[1]
    return f"{case}, row {row // time}, position {row % time}"


def _gone(
    found: Comparison, key: str, case: str, reason: str, old: NDArray[np.float64], current: NDArray[np.float64] | None
) -> None:
    why = reason or f"it has {0 if current is None else len(current)} figures, the snapshot {len(old)}"
    found.findings.append(Finding("behaviour", f"{key}: the snapshot holds it, and it is no more: {why}", key))


def _blocks(found: Comparison, snapshot: Snapshot, now: Observed) -> None:
    for case in FORWARDS:
        old, new = snapshot.behaviour.places.get(case), now.measured.places.get(case)
        if old is None or case in now.measured.missing:
            continue
        if new is None:
            text = f"{case}: no repeated blocks are found any more, so only logits were compared"
        elif len(old) != len(new):
            text = f"{case}: the model has {len(new) - 1} blocks, the snapshot {len(old) - 1}"
        elif now.measured.figures[f"{case}/0"].shape != snapshot.behaviour.keys[f"{case}/0"].values.shape:
            text = f"{case}: hidden states have another shape"
        else:
            continue
        found.findings.append(Finding("behaviour", text, case))
        return


def _greedy(found: Comparison, snapshot: Snapshot, now: Observed) -> None:
    old, new = snapshot.behaviour.greedy, now.measured.greedy
    if old is None:
        return
    if new is None:
        why = now.measured.missing.get("greedy", "")
        found.findings.append(
            Finding("behaviour", f"greedy: the snapshot holds it, and it is no more: {why}", "greedy")
        )
        return
    found.compared += 1
    for row, stable in enumerate(snapshot.behaviour.stable):
        expected = old[row, :stable].tolist()
        given = new[row, :stable].tolist() if row < len(new) else []
        if given != expected:
            step = next((i for i, (a, b) in enumerate(zip(expected, given)) if a != b), len(given))
            found.findings.append(
                Finding(
                    "behaviour",
                    f"greedy continuation of row {row} differs from new token {step} on: {' '.join(map(str, given))}, "
                    f"the snapshot has {' '.join(map(str, expected))}",
                    f"greedy, row {row}, new token {step}",
                )
            )
            return


# -- weights and inventory ---------------------------------------------------------------------------------------------


def _weights(found: Comparison, snapshot: Snapshot) -> Iterator[Finding]:
    for move in found.moves:
        if move.key == "weights" and move.changed:
            names = [snapshot.slots[row].names[0] for row in move.rows]
            said = (
                "numbers of a fresh initialisation differ between releases of torch and between processors; without "
                "--as-loaded lmconform draws the weights, and only what the model does with them is compared"
                if snapshot.as_loaded
                else "their builder computes them, all others are lmconform's: look at how the model is initialised"
            )
            yield Finding(
                "weights",
                f"{len(names)} of {move.total} parameters hold other numbers: {_listed(names)}; by up to "
                f"{move.size:.2g} of their size\n{said}",
                names[0], move.size, move.allowed,
            )  # fmt: skip


def _inventory(snapshot: Snapshot, now: Observed) -> Iterator[Finding]:
    renamed = dict(now.deal.renamed)
    if renamed:
        pairs = [f"{old} -> {new}" for old, new in renamed.items()]
        yield Finding("inventory", f"{_counted(pairs, 'parameter')} renamed: {_listed(pairs)}", pairs[0])
    aliases = {old: new for slot, names in zip(now.deal.slots, now.deal.holders, strict=True)
               if names is not None for old, new in zip(slot.names, names)}  # fmt: skip
    for what, old, new in (
        ("parameter", snapshot.inventory.parameters, now.inventory.parameters),
        ("buffer", snapshot.inventory.buffers, now.inventory.buffers),
    ):
        moved = {aliases.get(name, name): text for name, text in old.items()} if what == "parameter" else old
        for label, entries in (
            ("gone", [f"{name} ({moved[name]})" for name in moved if name not in new]),
            ("new", [f"{name} ({new[name]})" for name in new if name not in moved]),
            ("changed", [f"{n} ({moved[n]} -> {new[n]})" for n in moved if n in new and new[n] != moved[n]]),
        ):
            if entries:
                yield Finding("inventory", f"{_counted(entries, what)} {label}: {_listed(entries)}", entries[0])
    before = {tuple(sorted(aliases.get(name, name) for name in group)) for group in snapshot.inventory.tied}
    after = {tuple(sorted(group)) for group in now.inventory.tied}
    for label, groups in (("no longer tied", before - after), ("now tied", after - before)):
        for group in sorted(groups):
            yield Finding("inventory", f"{label}: {', '.join(group)}", group[0])


def _counted(entries: list[str], what: str) -> str:
    return f"{len(entries)} {what}" + ("" if len(entries) == 1 else "s")


def _listed(entries: list[str]) -> str:
    shown = ", ".join(entries[:LISTED])
    return shown if len(entries) <= LISTED else f"{shown} and {len(entries) - LISTED} more"


# -- for information ---------------------------------------------------------------------------------------------------


def _notes(found: Comparison, snapshot: Snapshot, now: Observed) -> Iterator[str]:
    before = snapshot.behaviour
    rounding = []
    for move in found.moves:
        told, _ = allowed(before.keys[move.key])
        difference = np.nan_to_num(np.abs(now.measured.figures[move.key] - before.keys[move.key].values)).max(-1)
        if not move.changed and bool((difference > told).any()):
            rounding.append(move)
    if rounding:
        worst = max(rounding, key=lambda move: move.times)
        yield (
            f"{len(rounding)} of {len(found.moves)} keys moved within float32 rounding, by up to {worst.size:.1g} of "
            f"their size ({worst.key}): computed in another way, no finding"
        )
    yield from unheld(snapshot)
    if now.computed_in != snapshot.computed_in:
        yield f"computed in {now.computed_in}; the snapshot was taken in {snapshot.computed_in}"
    named = sorted({*snapshot.config, *now.config})
    old, new = snapshot.config, now.config
    settings = [f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in named if old.get(name) != new.get(name)]
    if settings:
        yield f"config: {_listed(settings)}"
    keys = [key for key in snapshot.provenance if key != "config"]
    others = [f"{key} {snapshot.provenance[key]} -> {now.provenance.get(key)}"
              for key in keys if snapshot.provenance[key] != now.provenance.get(key)]  # fmt: skip
    if others:
        yield f"taken under other circumstances: {', '.join(others)}"
    if now.speed and snapshot.speed:
        times = [f"{name} {snapshot.speed[name]:.3g} -> {now.speed[name]:.3g}"
                 for name in snapshot.speed if name in now.speed]  # fmt: skip
        yield f"time in units of a fixed piece of work, for information: {', '.join(times)}"


def unheld(snapshot: Snapshot) -> Iterator[str]:
    """Where rounding alone moves figures so far that a snapshot holds little there."""
    before = snapshot.behaviour
    for key, figures in before.keys.items():
        _, bound = allowed(figures)
        loose = int((bound > UNTESTED * figures.scale).sum())
        if loose and not key.endswith("/modules"):
            yield f"{key}: rounding alone moves {loose} of {len(bound)} figures by a hundredth; little is held there"
    short = [
        row for row, stable in enumerate(before.stable) if before.greedy is not None and stable < before.greedy.shape[1]
    ]
    if short:
        yield f"greedy: rounding changes the continuation of rows {short}; only what comes before is compared"
