"""What a subject can do, probed once, each with the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform import conventions, structure

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen


@dataclass(frozen=True)
class Capability:
    """Whether the subject can, and in words why not. `value`: what was found out beside it, where there is more."""

    ok: bool
    reason: str = ""
    value: int | None = None

    def __bool__(self) -> bool:
        return self.ok


YES = Capability(True)


def probe(subject: Specimen, name: str) -> Capability:
    """Probe one capability of `lmconform.registry.CAPABILITIES`, or `ignored_label`."""
    return _PROBES[name](subject)


def _takes(field: str, names: tuple[str, ...]) -> Callable[[Specimen], Capability]:
    def takes(subject: Specimen) -> Capability:
        if getattr(subject.convention, field) is None:
            called = subject.convention
            holder = called.describe() if called.call else f"{type(subject.module).__name__}.forward()"
            return Capability(False, f"{holder} takes none of {', '.join(names)}")
        return YES

    return takes


def _mask(subject: Specimen) -> Capability:
    refusal = subject.convention.mask_refusal
    if refusal:
        subject.announce(refusal)
        return Capability(False, refusal)
    return _takes("mask", conventions.MASK)(subject)


def _positions(subject: Specimen) -> Capability:
    refusal = subject.convention.positions_refusal
    if refusal:
        return Capability(False, refusal)
    return _takes("positions", conventions.POSITIONS)(subject)


def _labels(subject: Specimen) -> Capability:
    refusal = subject.convention.labels_refusal
    return Capability(False, refusal) if refusal else _takes("labels", conventions.LABELS)(subject)


def ignored_label(subject: Specimen) -> int:
    """The label that its loss leaves out: -100, or -1 where it refuses -100 and takes -1 (nanoGPT, minGPT)."""
    found = subject.can("ignored_label").value
    return conventions.IGNORED if found is None else found


def as_given(subject: Specimen, labels: Tensor) -> Tensor:
    """`labels`, -100 where nothing counts, with the label in its place that this subject leaves out."""
    ignored = ignored_label(subject)
    return labels if ignored == conventions.IGNORED else labels.masked_fill(labels == conventions.IGNORED, ignored)


def _ignored_label(subject: Specimen) -> Capability:
    """By trying, on the CPU: elsewhere an index out of range takes the process down.

    Ask before the model is sharded, recorded or run under vmap: the answer is kept, and copies inherit it.
    """
    if subject.convention.labels is None:
        return Capability(False, f"no labels are taken, so none is left out: {subject.can('labels').reason}")
    shifted = subject.convention.labels_shifted
    probed = subject
    if subject.device.type != "cpu" and not shifted:
        probed = subject.copy()
        probed.module.to("cpu")
    ids = probed.probe_ids(2, 5)
    refused = ""
    for candidate in (conventions.IGNORED,) if shifted else (conventions.IGNORED, -1):
        labels = ids.clone()
        labels[0, 2:4] = candidate
        try:
            probed.forward(ids, labels=labels)
        except Exception as error:
            refused = refused or f"{type(error).__name__}: {conventions.first_line(error)}"
            continue
        return Capability(True, refused, candidate)
    return Capability(False, refused)


def _cache(subject: Specimen) -> Capability:
    taken = _takes("cache", conventions.CACHE)(subject)
    if not taken:
        return taken
    if required := [name for name, how in subject.convention.filled if how != "none"]:
        return Capability(
            False,
            f"forward() requires {', '.join(required)}, and what is right beside a cache cannot be guessed; an adapter "
            "can say it: Subject(build, call=...)",
        )
    try:
        output = subject.forward(subject.probe_ids(), use_cache=True)
    except Exception:  # the cache is offered; that it does not work is for the checks to say
        return YES
    if output.cache is None:
        return Capability(
            False,
            f"forward() takes {subject.convention.cache} but gives no cache back; if the caller makes the cache and "
            "forward() writes into it, an adapter can do so: Subject(build, call=...)",
        )
    return YES


def _embeds(subject: Specimen) -> Capability:
    taken = _takes("embeds", conventions.EMBEDS)(subject)
    if not taken:
        return taken
    if structure.embedding(subject.module, subject.vocab_size) is None:
        return Capability(False, "no token embedding found to make inputs_embeds with")
    try:
        subject.logits(embeds=subject.embed(subject.probe_ids()))
    except (ValueError, NotImplementedError) as error:  # a refusal in words; any other failure is for the checks to say
        return Capability(False, f"forward() refuses inputs_embeds: {conventions.first_line(error)}")
    except Exception:
        return YES
    return YES


def _gen(subject: Specimen) -> Capability:
    if not callable(getattr(subject.module, "generate", None)):
        return Capability(False, f"{type(subject.module).__name__} has no generate()")
    can_generate = getattr(subject.module, "can_generate", None)
    if callable(can_generate) and not can_generate():
        return Capability(False, f"{type(subject.module).__name__}.can_generate() is False")
    return YES


def _rebuild(subject: Specimen) -> Capability:
    if subject.builder is None:
        return Capability(False, "a finished model was given; give a builder, a callable that returns it")
    return YES


def _config(subject: Specimen) -> Capability:
    if structure.config_of(subject.module) is None:
        return Capability(False, f"{type(subject.module).__name__} has no config")
    return YES


def _ckpt(subject: Specimen) -> Capability:
    if not callable(getattr(subject.module, "gradient_checkpointing_enable", None)):
        return Capability(False, f"{type(subject.module).__name__} has no gradient_checkpointing_enable()")
    if getattr(subject.module, "supports_gradient_checkpointing", True) is False:
        return Capability(False, f"{type(subject.module).__name__}.supports_gradient_checkpointing is False")
    return YES


def _processes(subject: Specimen) -> Capability:
    from lmconform.measuring.ranks import reason_against

    reason = reason_against(subject)
    return Capability(False, reason) if reason else YES


def _peft(subject: Specimen) -> Capability:
    from lmconform.measuring.adapters import reason_against

    reason = reason_against(subject)
    return Capability(False, reason) if reason else YES


def _given(field: str, what: str) -> Callable[[Specimen], Capability]:
    def given(subject: Specimen) -> Capability:
        return YES if getattr(subject, field) is not None else Capability(False, f"{what} was not given")

    return given


def _tokenizer(subject: Specimen) -> Capability:
    if subject.tokenizer is not None:
        return YES
    return Capability(False, subject.tokenizer_trouble or "a tokenizer was not given")


_PROBES: dict[str, Callable[[Specimen], Capability]] = {
    "mask": _mask,
    "pos": _positions,
    "cache": _cache,
    "embeds": _embeds,
    "labels": _labels,
    "ignored_label": _ignored_label,
    "gen": _gen,
    "save": lambda subject: YES,
    "rebuild": _rebuild,
    "config": _config,
    "ckpt": _ckpt,
    "ref": _given("reference", "a reference (--reference)"),
    "tok": _tokenizer,
    "recipe": _given("recipe", "a recipe"),
    "processes": _processes,
    "peft": _peft,
}
