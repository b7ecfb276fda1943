"""generation: beams score what they claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.generation import CACHED
from lmconform.checks.generation_steps import why_not_plain
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.generating import Generator
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.cases import Case
    from lmconform.context import Context
    from lmconform.measuring.generating import Beams
    from lmconform.specimen import Specimen

GOES_ON = Hint(
    "a beam goes on after its end-of-text token, and what follows is counted in its score",
    "generation.stop_ignored",
    "generation.beam_score_wrong",
)
SUMMED = Hint(
    "each token's log-probability is right, and what is made of them is not: the length penalty divides by another "
    "length or multiplies, or the sum is over other tokens",
    "generation.beam_score_wrong",
)
NOT_REORDERED = Hint(
    "one row alone gets the logits of plain forwards in every step, and a beam loses them once its cache has to come "
    "from another beam's place: the cache, or a part of it, is not reordered with the beams",
    "cache.not_reordered",
)
GENERAL = Hint(
    "the cache was not reordered with the beams, scores were added up before log_softmax, or the length penalty "
    "divides by another length",
    "generation.beam_score_wrong",
    "cache.not_reordered",
)
PROMPTS = 3  # sets of them, tried in turn until beams cross: four in five do, at whatever temperature
CROSSES_FROM = 3  # new tokens: the first come from one prompt, the second from each beam's own place


@dataclass
class Searched:
    """One beam search: its prompts [batch, time], what generate() was given, and what came of it."""

    prompts: Tensor
    new: int
    controls: dict[str, Any]
    found: Beams


@register_check(
    "generation.beams",
    holds="a beam's score equals its rescored log-probability",
    needs=("gen",),
    requires=CACHED,
    space={
        "beams": Span(2, 6), "rows": Span(1, 3), "time": Span(1, 24), "new": Span(1, 8),
        "penalty": Choice(1.0, 0.0, 0.5, 2.0), "eos": Choice(False, True),
    },
    grid=(
        {"beams": 3, "rows": 2, "time": 5, "new": 4, "penalty": 2.0, "eos": False},
        # a penalty below 1, or a beam that has ended early is never among the best
        {"beams": 4, "rows": 2, "time": 13, "new": 6, "penalty": 0.5, "eos": True},
    ),
)  # fmt: skip
def check_beams(subject: Specimen, ctx: Context) -> None:
    """sequences_scores against the sum of log-probabilities, rescored by one forward, over length ** length_penalty.

    Logits are flattened by a temperature, so that several texts are nearly as good and beams cross: between sharp ones
    each keeps its place, and a cache that is not reordered is never missed.
    """
    import torch

    generator = Generator(subject)
    if not generator.hugging_face:
        ctx.not_applicable(f"{generator.holder}.generate({generator.signature}) returns no sequences_scores")
    crossings = 0
    for case in ctx.cases():
        search = _crossing(generator, ctx, case)
        prompts, found, temperature = search.prompts, search.found, search.found.temperature
        end = search.controls.get("eos_token_id")
        crossed = found.crossed()
        crossings += int(crossed[:, -1].sum()) if crossed is not None else 0
        full = torch.cat([prompts.repeat_interleave(case.beams, 0), found.tokens], dim=1)
        logits = subject.logits(full)[:, prompts.shape[1] - 1 : -1]
        each = (logits.double() / temperature).log_softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
        counts = torch.ones_like(found.tokens, dtype=torch.bool)
        if end is not None:
            ended = (found.tokens == end).long()
            counts = (ended.cumsum(-1) - ended) == 0  # up to the end token, itself included
        lengths = counts.sum(-1)
        rescored = (each * counts).sum(-1) / lengths.double() ** case.penalty
        # a log-probability is off by at most twice what its logits are off by, and generate() adds up in float32
        per_token = 2 * tolerance.allowed(subject.noise, logits) / temperature + tolerance.allowed(0.0, each.float())
        bound = per_token * float((lengths / lengths.double() ** case.penalty).max())
        scores = found.scores.double()
        wrong = ~((scores - rescored).abs() <= bound)
        hint = GENERAL
        if bool(wrong.any()):
            goes_on = (~counts & (found.tokens != search.controls.get("pad_token_id"))).any(-1)
            if bool(goes_on[wrong].all()):
                hint = GOES_ON
            elif found.claimed is not None and crossed is not None:
                off = counts & ~((found.claimed.double() - each).abs() <= per_token)
                hint = _why(subject, ctx, prompts, search.new, off[wrong], crossed[wrong])
        ctx.equal(
            scores,
            rescored,
            "a beam's score differs from its rescored log-probability",
            allowed=bound,
            axes=("beam",),
            hint=hint,
        )
    if not crossings:
        ctx.note("no beam was seen to take over another's cache: this says nothing of how the cache is reordered")


def _controls(subject: Specimen, prompts: Tensor, case: Case) -> tuple[dict[str, Any], float]:
    """What generate() is given for the case, and the temperature at which its first beams are within one nat."""
    import torch

    # a padding token's embedding may be all zeros: nothing to tell keys apart by, where only the best are attended
    special = sorted(set(structure.special_ids(subject.module).values()))
    suppressed = [token for token in special if token < subject.vocab_size]
    controls: dict[str, Any] = {
        "num_return_sequences": case.beams,
        "length_penalty": case.penalty,
        "suppress_tokens": suppressed,
    }
    following = _following(subject, prompts, suppressed)
    best = following.topk(min(case.beams, subject.vocab_size)).values.double()
    gaps = best[:, 0] - best[:, -1]
    temperature = max([1.0, *gaps[gaps.isfinite()].tolist()])
    if case.eos:
        likeliest = following.argmax(-1, keepdim=True)
        second = _following(subject, torch.cat([prompts, likeliest], dim=1), [*suppressed, int(likeliest[0])])
        end = int(second[0].argmax())  # likely to end a beam, and not at its first token
        used = {*prompts.flatten().tolist(), end}
        # transformers takes a padding token 0 for none, and fills up with the end token
        pad = next((token for token in range(1, subject.vocab_size) if token not in used), 0)
        controls |= {"eos_token_id": end, "pad_token_id": pad}
    return controls, temperature


def _following(subject: Specimen, ids: Tensor, suppressed: list[int]) -> Tensor:
    """The logits [batch, vocab] of the token after `ids`, those of `suppressed` tokens -inf."""
    logits = subject.logits(ids)[:, -1].clone()
    logits[:, suppressed] = float("-inf")
    return logits


def _crossing(generator: Generator, ctx: Context, case: Case) -> Searched:
    """Beams that cross, if those of one of the first prompts do."""
    subject = generator.subject
    new = min(case.new, subject.longest(128) - 1)
    for salt in range(PROMPTS):
        prompts = ctx.ids(case.rows, subject.longest(case.time + new) - new, salt)
        controls, temperature = _controls(subject, prompts, case)
        try:
            found = generator.beams(prompts, new, beams=case.beams, temperature=temperature, **controls)
        except ValueError as refusal:
            ctx.not_applicable(f"generate() refuses beam search: {first_line(refusal)}")
        searched = Searched(prompts, new, controls, found)
        crossed = found.crossed()
        if new < CROSSES_FROM or crossed is None or bool(crossed.any()):
            break
    return searched


def _why(subject: Specimen, ctx: Context, prompts: Tensor, new: int, off: Tensor, crossed: Tensor) -> Hint:
    """Why rows' scores are wrong; `off` [rows, time]: the tokens whose log-probabilities are, `crossed` as in Beams."""
    import torch

    if not bool(off.any()):
        return SUMMED
    made, chosen_from = Generator(subject).greedy_with_logits(prompts, new)
    if chosen_from is None:
        return GENERAL
    plain = subject.logits(torch.cat([prompts, made], dim=1))[:, prompts.shape[1] - 1 : -1]
    bound = tolerance.allowed(subject.noise, plain.float())
    if not float((chosen_from.double() - plain.double()).abs().max()) <= bound:
        return why_not_plain(subject, ctx, prompts, new)
    return GENERAL if bool((off & ~crossed).any()) else NOT_REORDERED
