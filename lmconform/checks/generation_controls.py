"""generation: the controls of sampling do what they say, measured on the probabilities that are drawn from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.generate_calls import calls_recorded
from lmconform.measuring.generating import Generator
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

KINDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram", "beams")
ROWS, TIME = 6, 7


@register_check(
    "generation.controls",
    holds="temperature, top-k, top-p, min-p, repetition penalty, no_repeat_ngram and beams do what they say, in the "
    "right direction",
    needs=("gen",),
    requires=(*COMPARES_LOGITS, "generation.greedy"),
    space={"kind": Choice(*KINDS), "level": Span(0, 2), "new": Span(1, 6)},
    grid=(
        {"kind": "temperature", "level": 0, "new": 2},
        {"kind": "temperature", "level": 2, "new": 2},
        {"kind": "top_k", "level": 1, "new": 2},
        {"kind": "top_p", "level": 0, "new": 2},
        {"kind": "top_p", "level": 2, "new": 1},
        {"kind": "min_p", "level": 1, "new": 2},
        {"kind": "repetition_penalty", "level": 1, "new": 3},
        {"kind": "no_repeat_ngram", "level": 1, "new": 3},
        {"kind": "beams", "level": 1, "new": 2},
    ),
)
def check_controls(subject: Specimen, ctx: Context) -> None:
    """One control at a time: what is drawn from, against the closed form over the logits of a plain forward.

    The probabilities are read where torch.multinomial is called, so nothing depends on luck.
    """
    generator = Generator(subject)
    tried: list[str] = []
    offered: list[str] = []
    for case in ctx.cases():
        tried.append(case.kind)
        control = {"no_repeat_ngram": "no_repeat_ngram_size", "beams": "num_beams"}.get(case.kind, case.kind)
        if not generator.offers(control) or (case.kind == "beams" and not generator.hugging_face):
            continue
        offered.append(case.kind)
        if case.kind == "beams":
            try:
                _beams(subject, ctx, generator, (2, 4, 8)[case.level])
            except ValueError as refusal:
                ctx.note(f"generate() refuses beam search: {first_line(refusal)}")
            continue
        ids = ctx.ids(ROWS, min(TIME, subject.longest(TIME + case.new) - case.new))
        value = _LEVELS[case.kind][case.level]
        if case.kind == "no_repeat_ngram":
            ids = ids[:, -value:].repeat(1, 2)[:, 1:]  # the last value - 1 tokens were seen before, with what followed
        full, reference, drawn = _sampled(subject, ctx, generator, ids, case.new, {control: value})
        for step, (logits, probabilities) in enumerate(zip(reference, drawn, strict=True)):
            before = full[:, : ids.shape[1] + step]
            _EXPECTED[case.kind](ctx, subject, generator, value, logits, probabilities, before, step)
    if not offered:
        ctx.not_applicable(f"{generator.holder}.generate({generator.signature}) offers no control that is known here")
    missing = [kind for kind in KINDS if kind in tried and kind not in offered]
    if missing:
        ctx.note(f"not offered by generate(): {', '.join(missing)}")


_LEVELS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.5, 1.0, 2.0),
    "top_k": (1, 5, 20),
    "top_p": (0.3, 0.6, 0.9),
    "min_p": (0.05, 0.2, 0.5),
    "repetition_penalty": (1.2, 1.5, 3.0),
    "no_repeat_ngram": (1, 2, 3),
}


def _sampled(
    subject: Specimen, ctx: Context, generator: Generator, ids: Tensor, new: int, controls: dict[str, Any]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Prompt and sampled tokens, and per step the logits inside generate() and the probabilities drawn from.

    The logits are those of its own calls of forward(), where they are seen, else of a plain forward: whether the two
    agree is for generation.greedy to say.
    """
    import torch

    with calls_recorded(subject) as calls:
        made, drawn = generator.sample(ids, new, **controls)
    if not drawn:
        _refuse_argmax(subject, ctx, generator, ids)
    if len(drawn) != made.shape[1] or any(step.shape != (len(ids), subject.vocab_size) for step in drawn):
        ctx.not_applicable(
            f"{generator.holder}.generate() does not draw each token by torch.multinomial over the vocabulary, so what "
            "it draws from cannot be seen"
        )
    full = torch.cat([ids, made], dim=1)
    own = [call.logits for call in calls]
    if len(own) != made.shape[1] or any(step.shape != (len(ids), subject.vocab_size) for step in own):
        own = list(subject.logits(full)[:, ids.shape[1] - 1 : -1].unbind(1))
    return full, [step.double() for step in own], [step.double() for step in drawn]


def _refuse_argmax(subject: Specimen, ctx: Context, generator: Generator, ids: Tensor) -> None:
    """Where no draw was seen: the likeliest token every time is no sampling, in whatever way it is drawn."""
    import torch

    if not generator.offers("do_sample"):
        return
    new = min(8, subject.longest(ids.shape[1] + 8) - ids.shape[1])
    made, _ = generator.sample(ids, new)
    logits = subject.logits(torch.cat([ids, made], dim=1))[:, ids.shape[1] - 1 : -1].double()
    chance = float(logits.log_softmax(-1).amax(-1).sum().exp())
    if made.shape[1] == new and bool((made == logits.argmax(-1)).all()) and chance < 1e-6:
        ctx.fail(
            f"generate(do_sample=True) took the likeliest token {made.numel()} times out of {made.numel()}, which "
            f"sampling does with probability {chance:.1g}",
            hint=Hint(
                "do_sample is overridden or not looked at, so that temperature, top-k and top-p do nothing, and what "
                "is said turns into loops",
                "generation.control_wrong",
            ),
        )


def _bound(subject: Specimen, logits: Tensor) -> float:
    """How far two log-probabilities of the same token may be apart: twice what the logits may be."""
    return 2 * tolerance.allowed(subject.noise, logits.to(subject.dtype))


def _felt(logits: Tensor) -> Tensor:
    """Where a probability is well above the smallest float32, so that 0 means excluded."""
    return logits > logits.amax(-1, keepdim=True) - 60


def _temperature(
    ctx: Context, subject: Specimen, generator: Generator, value: float, logits: Tensor, drawn: Tensor, before: Tensor,
    step: int,
) -> None:  # fmt: skip
    bound = _bound(subject, logits) / value
    wanted = (logits / value).log_softmax(-1)
    seen = wanted > math.log(1e-6)  # below, a probability in a short type has lost its digits
    hint = Hint("divide the logits by the temperature, once, before softmax", "generation.control_wrong")
    for name, other in (
        ("multiplied by", logits * value),
        ("not touched by", logits),
        ("divided twice by", logits / value**2),
    ):
        if value != 1 and float((drawn.log() - other.log_softmax(-1))[seen].abs().max()) <= bound * max(value, 1) ** 2:
            hint = Hint(
                f"the logits are {name} the temperature; divide them by it, once, before softmax",
                "generation.control_wrong",
            )
    ctx.equal(
        drawn.log()[seen], wanted[seen], f"at temperature {value} the log-probabilities drawn from are not "
        f"log_softmax(logits / {value})", where=f"step {step}", allowed=bound, axes=("kept token",), hint=hint,
    )  # fmt: skip


def _kept(
    ctx: Context, subject: Specimen, logits: Tensor, drawn: Tensor, threshold: Tensor, name: str, step: int, hint: str
) -> None:
    """Tokens with a logit above `threshold` [batch, 1] are kept, those below are not; the kept keep their ratios."""
    bound = _bound(subject, logits)
    felt = _felt(logits)
    kept = drawn > 0
    outside = (threshold - logits).masked_fill(~kept, -math.inf)
    inside = (logits - threshold).masked_fill(kept | ~felt, -math.inf)
    for gap, what in ((outside, "may draw a token that it excludes"), (inside, "never draws a token that it allows")):
        row, token = divmod(int(gap.argmax()), gap.shape[-1])
        measured = max(float(gap[row, token]), 0.0)
        place = f"step {step}, row {row}, token {token}, {int(kept[row].sum())} tokens kept"
        ctx.within(measured, bound, f"{name} {what}: its logit is past the limit", where=place, hint=hint)
    ratios = (drawn.log() - logits).masked_fill(~(kept & felt), math.nan)
    spread = ratios.nan_to_num(nan=-math.inf).amax(-1) - ratios.nan_to_num(nan=math.inf).amin(-1)
    ctx.within(
        float(spread.max()), 2 * bound, f"{name} changes the odds among the tokens that it keeps", where=f"step {step}",
        hint=Hint("set excluded logits to -inf before softmax and leave the others alone", "generation.control_wrong"),
    )  # fmt: skip


def _top_k(
    ctx: Context, subject: Specimen, generator: Generator, value: int, logits: Tensor, drawn: Tensor, before: Tensor,
    step: int,
) -> None:  # fmt: skip
    # halfway between the last kept and the first excluded, so that a tie of the two passes either way
    best = logits.topk(min(value + 1, logits.shape[-1]), dim=-1).values
    threshold = best[:, value - 1 :].mean(-1, keepdim=True) if best.shape[-1] > value else best[:, -1:]
    hint = Hint(
        "keep the k largest logits: compare with topk(k).values[..., -1:] of the same row", "generation.control_wrong"
    )
    _kept(ctx, subject, logits, drawn, threshold, f"top_k={value}", step, hint)


def _top_p(
    ctx: Context, subject: Specimen, generator: Generator, value: float, logits: Tensor, drawn: Tensor, before: Tensor,
    step: int,
) -> None:  # fmt: skip
    """The smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020)."""
    ordered, _ = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(-1).cumsum(-1)
    reach = (mass < value - 1e-6).sum(-1, keepdim=True)  # the index of the token that takes the mass over p
    last = ordered.gather(-1, reach)
    following = ordered.gather(-1, (reach + 1).clamp(max=logits.shape[-1] - 1))
    hint = Hint(
        "sort by probability, cut after the token that takes the cumulative mass over p (not before it), and put the "
        "cut back in the order of the vocabulary",
        "generation.control_wrong",
    )
    _kept(ctx, subject, logits, drawn, (last + following) / 2, f"top_p={value}", step, hint)


def _min_p(
    ctx: Context, subject: Specimen, generator: Generator, value: float, logits: Tensor, drawn: Tensor, before: Tensor,
    step: int,
) -> None:  # fmt: skip
    """Tokens at least `min_p` times as likely as the most likely one (Nguyen et al. 2024)."""
    threshold = logits.amax(-1, keepdim=True) + math.log(value)
    hint = Hint(
        "the limit is min_p times the largest probability of the row, not min_p itself", "generation.control_wrong"
    )
    _kept(ctx, subject, logits, drawn, threshold, f"min_p={value}", step, hint)


def _repetition_penalty(
    ctx: Context, subject: Specimen, generator: Generator, value: float, logits: Tensor, drawn: Tensor, before: Tensor,
    step: int,
) -> None:  # fmt: skip
    """Odds against tokens never seen must fall for every token seen, whatever the sign of its logit.

    Keskar et al. 2019 divide, which raises a negative logit: https://github.com/huggingface/transformers/pull/2303
    """
    import torch

    prompt = before.shape[1] - step
    counted = before if generator.hugging_face else before[:, prompt:]
    seen = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, counted, True)
    unseen = torch.ones_like(seen).scatter_(1, before, False)
    felt = _felt(logits)
    seen, unseen = seen & felt, unseen & felt
    if not bool(seen.any() and unseen.any(-1).all()):
        return
    shift = drawn.log() - logits
    base = shift.masked_fill(~unseen, math.nan).nanmedian(-1, keepdim=True).values
    moved = (shift - base).masked_fill(~seen, math.nan)
    bound = 2 * _bound(subject, logits)
    row, token = divmod(int(moved.nan_to_num(nan=-math.inf).argmax()), moved.shape[-1])
    ctx.within(
        max(float(moved[row, token]), 0.0),
        bound,
        f"repetition_penalty={value} makes a token that was seen more likely, not less",
        where=f"step {step}, row {row}, token {token}, whose logit is {float(logits[row, token]):.4g}",
        hint=Hint(
            "dividing a negative logit by the penalty raises it: divide positive logits, multiply negative ones",
            "generation.penalty_sign",
        ),
    )
    telling = seen & (logits.abs() * (1 - 1 / value) > 4 * bound)
    still = telling & (moved.nan_to_num(nan=0.0) > -bound)
    if bool(still.any()):
        row, token = still.nonzero()[0].tolist()
        ctx.fail(
            f"repetition_penalty={value} leaves a token that was seen as likely as before",
            where=f"step {step}, row {row}, token {token}, whose logit is {float(logits[row, token]):.4g}",
            hint=Hint(
                "it must reach every token of the context, prompt and new tokens, in every row and step",
                "generation.penalty_sign",
                "generation.control_wrong",
            ),
        )


def _no_repeat_ngram(
    ctx: Context, subject: Specimen, generator: Generator, value: int, logits: Tensor, drawn: Tensor, before: Tensor,
    step: int,
) -> None:  # fmt: skip
    hint = Hint(
        "ban what followed the last n - 1 tokens wherever they stood before, in each row by its own tokens",
        "generation.control_wrong",
    )
    for row, tokens in enumerate(before.tolist()):
        tail = tokens[len(tokens) - value + 1 :]
        starts = range(len(tokens) - value + 1)
        banned = {tokens[i + value - 1] for i in starts if tokens[i : i + value - 1] == tail}
        for token in banned:
            if float(drawn[row, token]) > 0:
                ctx.fail(
                    f"no_repeat_ngram_size={value} lets a {value}-gram come twice",
                    where=f"step {step}, row {row}: token {token} after {tail}, context {tokens}", hint=hint,
                )  # fmt: skip
        wanted = logits[row].log_softmax(-1) > math.log(1e-6)
        lost = [token for token in (wanted & (drawn[row] == 0)).nonzero().flatten().tolist() if token not in banned]
        if lost:
            ctx.fail(
                f"no_repeat_ngram_size={value} bans a token that would repeat nothing",
                where=f"step {step}, row {row}: token {lost[0]} after {tail}, context {tokens}", hint=hint,
            )  # fmt: skip


def _beams(subject: Specimen, ctx: Context, generator: Generator, beams: int) -> None:
    """Two steps of beam search have one right answer: the best pair over the `beams` best first tokens."""
    import torch

    ids = ctx.ids(1, subject.longest(TIME) - 2)
    beams = min(beams, subject.vocab_size // 2)
    logits = subject.logits(ids)[:, -1].double()
    first, tokens = logits.log_softmax(-1).topk(beams)
    following = subject.logits(torch.cat([ids.expand(beams, -1), tokens[0][:, None]], 1))[:, -1].double()
    best = float((first[0] + following.log_softmax(-1).amax(-1)).max())
    made = generator.greedy(ids, 2, num_beams=beams)
    if made.shape[1] != 2:
        ctx.fail(f"beam search gave {made.shape[1]} new tokens, asked for 2, and no end-of-text token is set")
    second = subject.logits(torch.cat([ids, made[:, :1]], 1))[:, -1].double().log_softmax(-1)
    reached = float(logits.log_softmax(-1)[0, made[0, 0]] + second[0, made[0, 1]])
    ctx.within(
        max(best - reached, 0.0),
        2 * _bound(subject, logits),
        f"beam search with num_beams={beams} misses the likeliest two tokens: their log-probability is below the best",
        where=f"found {made[0].tolist()} at {reached:.4g}, the best pair has {best:.4g}",
        hint=Hint(
            "scores must add up log-probabilities over steps, candidates come from all beams, and the cache must be "
            "reordered with them",
            "generation.control_wrong",
            "generation.beam_score_wrong",
        ),
    )


_EXPECTED = {
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "repetition_penalty": _repetition_penalty,
    "no_repeat_ngram": _no_repeat_ngram,
}
