"""What a subject can do, probed once, each with the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform import conventions, structure

if TYPE_CHECKING:
    from lmconform.specimen import Specimen


@dataclass(frozen=True)
class Capability:
    """Whether the subject can, and in words why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Capability(True)


def probe(subject: Specimen, name: str) -> Capability:
    """Probe one capability of `lmconform.registry.CAPABILITIES`."""
    return _PROBES[name](subject)


def _takes(field: str, names: tuple[str, ...]) -> Callable[[Specimen], Capability]:
    def takes(subject: Specimen) -> Capability:
        if getattr(subject.convention, field) is None:
            holder = "call()" if subject.convention.call else f"{type(subject.module).__name__}.forward()"
            return Capability(False, f"{holder} takes none of {', '.join(names)}")
        return YES

    return takes


def _cache(subject: Specimen) -> Capability:
    taken = _takes("cache", conventions.CACHE)(subject)
    if not taken:
        return taken
    try:
        output = subject.forward(subject.probe_ids(), use_cache=True)
    except Exception:  # the cache is offered; that it does not work is for the checks to say
        return YES
    if output.cache is None:
        return Capability(False, f"forward() takes {subject.convention.cache} but gives no cache back")
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


_PROBES: dict[str, Callable[[Specimen], Capability]] = {
    "mask": _takes("mask", conventions.MASK),
    "pos": _takes("positions", conventions.POSITIONS),
    "cache": _cache,
    "embeds": _embeds,
    "labels": _takes("labels", conventions.LABELS),
    "gen": _gen,
    "save": lambda subject: YES,
    "rebuild": _rebuild,
    "config": _config,
    "ckpt": _ckpt,
    "ref": _given("reference", "a reference (--reference)"),
    "tok": _given("tokenizer", "a tokenizer"),
    "recipe": _given("recipe", "a recipe"),
    "processes": _processes,
    "peft": _peft,
}
