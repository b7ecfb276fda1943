"""Where does the future come in: through attention's mask, or elsewhere? A causal mask is imposed from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.entrance import FIRST, Entrance, Kind, find_entrance, straightened
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.diagnosis.probes.imposed_mask import future_weights, imposed_causal_mask
from lmconform.diagnosis.probes.places import along_time, first_difference, norm_over_time
from lmconform.measuring.dropout import without_dropout
from lmconform.measuring.traces import distinct_length
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

MASKS = (
    "mask.missing", "mask.off_by_one", "mask.inverted", "mask.block_leak", "mask.soft", "mask.fast_path",
    "mask.train_only", "mask.query_offset",
)  # fmt: skip
NORM, MIXER = OUTSIDE = ("norm.over_sequence", "mixer.not_causal")
MIXES = "with later tokens its output at earlier ones changes, though its input there stays"
BESIDE = {  # where it is no matter of a mask
    Kind.queries: (NORM, "a softmax over the queries, not over the keys: later queries enter its sum"),
    Kind.hidden_late: (NORM, "its sum holds later keys, whose weights are set to 0 only afterwards"),
    Kind.norm: (NORM, MIXES),
    Kind.statistic: (NORM, "each position is centred or scaled by a mean or a size that is taken over the whole text"),
    Kind.order: (
        "attention.heads_scrambled",
        "each position is right before it, and holds entries of other positions after it: a transpose is missing",
    ),
    Kind.mixing: (MIXER, "before it earlier positions know nothing of later tokens, after it they do"),
}
LEFT = 0.9  # of a leak: so much is left where an imposed mask has nothing to do with it
SPREAD, FAINT = 0.9, 0.3  # of the later keys; of the weight of earlier ones


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """Replace the second half of a text and see what moves in the first, with and without a mask from outside.

    In eval mode without attention_mask and with one of all ones, then in train mode.
    """
    import torch

    time = subject.longest(24)
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(subject.ordinary_ids, 1, time, generator).to(subject.device)
    changed = ids.clone()
    half = time // 2
    changed[:, half:] = random_ids(subject.ordinary_ids, 1, time - half, generator).to(subject.device)
    ones = torch.ones_like(ids)

    def moved(specimen: Specimen = subject, mask: Tensor | None = None, train: bool = False) -> float:
        logits = []
        for each in (ids, changed):
            torch.manual_seed(seed)  # noise of train mode is the same both times
            logits.append(specimen.logits(each, mask=mask, train=train))
        base, other = logits
        return float((base - other)[:, FIRST:half].abs().max()) / tolerance.allowed(subject.noise, base)

    def before(tensor: Tensor) -> Tensor | None:
        found = along_time(tensor, len(ids), time)
        return None if found is None else found[:, :half]

    leaks, padded = {"without attention_mask": moved()}, ones.clone()
    if subject.can("mask"):
        leaks["with attention_mask"] = moved(mask=ones)
        padded[:, :FIRST] = 0
        leaks["with padding"] = moved(mask=padded)
    if max(leaks.values()) <= 1:
        return _in_training(subject, moved)
    first = next(kind for kind, ratio in leaks.items() if ratio > 1)
    mask = {"without attention_mask": None, "with attention_mask": ones}.get(first, padded)
    place = first_difference(
        subject,
        (lambda: subject.logits(ids, mask=mask), before),
        (lambda: subject.logits(changed, mask=mask), before),
    )
    one_sided = min(leaks.values()) <= 1
    leaking = " and ".join(kind for kind, ratio in leaks.items() if ratio > 1)
    path = Finding(
        "mask.fast_path",
        Verdict.seen if one_sided else Verdict.against,
        f"the leak is there only {leaking}" if one_sided else "",
    )
    found = [path, Finding("mask.train_only", Verdict.against), Finding("mask.query_offset", Verdict.against)]
    with future_weights() as noted:
        subject.logits(ids, mask=mask)
    if soft := [ratio for share, ratio in noted if share > SPREAD and ratio < FAINT]:
        where = f"later keys keep {max(soft):.2g} of the weight of earlier ones: lowered, not removed"
        found += [Finding("mask.soft", Verdict.seen, where), Finding("mask.missing", Verdict.against)]
    with imposed_causal_mask() as seen:
        after = moved(mask=mask)
    texts = _Texts.of(subject, padding={"without attention_mask": None, "with attention_mask": 0}.get(first, FIRST))
    enters = texts.entrance(subject, place) if texts is not None else None
    if seen.count and after <= 1 and (enters is None or enters.kind != Kind.hidden_late):
        leaky = str(enters) if enters is not None else place
        where = (
            f"{leaky}: with a causal mask imposed on its attention from outside, the leak falls from "
            f"{max(leaks.values()):.2g} to {after:.2g} times the bound"
            if leaky
            else ""
        )
        beyond = [Finding(NORM, Verdict.against), Finding(MIXER, Verdict.ruled_out)]  # BatchNorm leaks in train mode
        return [*found, *_of(MASKS[:5], Verdict.agrees, where), *beyond]
    if texts is not None and enters is not None:
        if enters.kind != Kind.attention:
            unmoved = not seen.count or after > LEFT * leaks[first]
            return _judged(subject, texts, enters, masks=Verdict.ruled_out if unmoved else Verdict.against)
        with imposed_causal_mask():
            then = texts.entrance(subject)
        if seen.count and then is not None and then.kind != Kind.attention:  # there are two
            beyond = _judged(subject, texts, then)[:1]
        else:
            beyond = _of(OUTSIDE, Verdict.against)
        return [*found, *_of(MASKS[:5], Verdict.agrees, str(enters)), *beyond]
    if not seen.count:
        return [*found, *_of(OUTSIDE, Verdict.place, place)]
    against = _of(MASKS, Verdict.against)  # something else mixes over time
    if not norm_over_time(subject, place, ids):
        return [*against, *_of(OUTSIDE, Verdict.agrees, place)]
    return [*against, Finding(NORM, Verdict.seen, f"{place}: {MIXES}"), Finding(MIXER, Verdict.against)]


@dataclass(frozen=True)
class _Texts:
    """Two texts of `time` tokens that differ in the later half, and their logits."""

    time: int
    logits: tuple[Callable[[], Tensor], Callable[[], Tensor]]

    @classmethod
    def of(cls, subject: Specimen, *, padding: int | None = None, train: bool = False) -> _Texts | None:
        """With an attention_mask whose first `padding` tokens are 0. None where no length can be told from sizes."""
        import torch

        time = distinct_length(subject)
        if time is None:
            return None
        generator = torch.Generator().manual_seed(time)
        ids, other = (random_ids(subject.ordinary_ids, 1, time, generator).to(subject.device) for _ in range(2))
        other[:, : time // 2] = ids[:, : time // 2]
        mask = None if padding is None else torch.ones_like(ids)
        if mask is not None:
            mask[:, :padding] = 0
        return cls(
            time,
            (
                lambda: subject.logits(ids, mask=mask, train=train),
                lambda: subject.logits(other, mask=mask, train=train),
            ),
        )

    def entrance(self, subject: Specimen, place: str = "") -> Entrance | None:
        try:
            return find_entrance(subject, self.time, self.logits, place)
        except Exception:  # a model that cannot be watched so closely; what else was found stands
            return None

    def leaks(self, subject: Specimen) -> bool:
        base, other = (logits() for logits in self.logits)
        change = (base - other)[:, FIRST : self.time // 2].abs().max()
        return float(change) > tolerance.allowed(subject.noise, base)


def _judged(subject: Specimen, texts: _Texts, enters: Entrance, *, masks: Verdict = Verdict.against) -> list[Finding]:
    """What an operation that is no matter of a mask says: its cause first, then those that it speaks against.

    `masks`: how much it says against theirs; where attention was met too, one of them may be wrong as well.
    """
    cause, what = BESIDE[enters.kind]
    verdict = Verdict.seen
    if cause == MIXER and norm_over_time(subject, enters.place, subject.probe_ids(1, 8)):
        cause, what = BESIDE[Kind.norm]
    if enters.kind == Kind.order:
        with straightened(enters, texts.time):
            cured = not texts.leaks(subject)
        verdict, what = (Verdict.cured, f"{what}; with it the leak is gone") if cured else (verdict, what)
    others = [other for other in OUTSIDE if other != cause]
    return [Finding(cause, verdict, f"{enters}: {what}"), *_of(others, Verdict.against), *_of(MASKS, masks)]


def _of(causes: Iterable[str], verdict: Verdict, where: str = "") -> list[Finding]:
    return [Finding(cause, verdict, where) for cause in causes]


def _in_training(subject: Specimen, moved: Callable[..., float]) -> list[Finding]:
    """Eval mode is right: is train mode, and does a mask imposed from outside mend it?"""
    quiet = without_dropout(subject)
    before = moved(quiet, train=True)
    if before <= 1:
        return []
    with imposed_causal_mask() as seen:
        after = moved(quiet, train=True)
    if seen.count and after <= 1:
        where = (
            f"in train mode alone; with a causal mask imposed from outside the leak falls from {before:.2g} to "
            f"{after:.2g} times the bound"
        )
        return [Finding("mask.train_only", Verdict.cured, where), *_of(OUTSIDE, Verdict.ruled_out)]
    texts = _Texts.of(quiet, train=True)
    enters = texts.entrance(quiet) if texts is not None else None
    if texts is not None and enters is not None:
        if enters.kind != Kind.attention:
            as_before = bool(seen.count) and after > LEFT * before
            return _judged(quiet, texts, enters, masks=Verdict.ruled_out if as_before else Verdict.against)
        where = f"in train mode alone: {enters}"
        return [Finding("mask.train_only", Verdict.agrees, where), *_of(OUTSIDE, Verdict.against)]
    where = "in train mode alone, and a causal mask imposed from outside does not mend it"
    return [*_of(OUTSIDE, Verdict.agrees, where), Finding("mask.train_only", Verdict.against)]
