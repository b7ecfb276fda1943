"""generation: beams score what they claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.generation import CACHED
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.generating import Generator
from lmconform.registry import register_check

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen

GOES_ON = Hint(
    "a beam goes on after its end-of-text token, and what follows is counted in its score",
    "generation.stop_ignored",
    "generation.beam_score_wrong",
)


@register_check(
    "generation.beams",
    holds="a beam's score equals its rescored log-probability",
    needs=("gen",),
    requires=CACHED,
    space={
        "beams": Span(2, 6), "rows": Span(1, 3), "time": Span(1, 24), "new": Span(1, 8),
        "penalty": Choice(1.0, 0.0, 2.0), "eos": Choice(False, True),
    },
    grid=(
        {"beams": 3, "rows": 1, "time": 5, "new": 2, "penalty": 1.0, "eos": False},
        {"beams": 4, "rows": 2, "time": 13, "new": 6, "penalty": 2.0, "eos": True},
    ),
)  # fmt: skip
def check_beams(subject: Specimen, ctx: Context) -> None:
    """sequences_scores against the sum of log-probabilities, rescored by one forward, over length ** length_penalty."""
    import torch

    generator = Generator(subject)
    if not generator.hugging_face:
        ctx.not_applicable(f"{generator.holder}.generate({generator.signature}) returns no sequences_scores")
    for case in ctx.cases():
        new = min(case.new, subject.longest(128) - 1)
        prompts = ctx.ids(case.rows, subject.longest(case.time + new) - new)
        extra: dict[str, Any] = {"num_return_sequences": case.beams, "length_penalty": case.penalty}
        # a padding token's embedding may be all zeros: nothing to tell keys apart by, where only the best are attended
        special = sorted(set(structure.special_ids(subject.module).values()))
        extra["suppress_tokens"] = [token for token in special if token < subject.vocab_size]
        end = None
        if case.eos:
            end = int(generator.greedy(prompts, new)[0, min(1, new - 1)])
            unused = [token for token in range(subject.vocab_size) if token not in (*prompts.flatten().tolist(), end)]
            extra |= {"eos_token_id": end, "pad_token_id": unused[0]}
            extra["suppress_tokens"] = [token for token in extra["suppress_tokens"] if token != end]
        try:
            found = generator.beams(prompts, new, beams=case.beams, **extra)
        except ValueError as refusal:
            ctx.not_applicable(f"generate() refuses beam search: {first_line(refusal)}")
        full = torch.cat([prompts.repeat_interleave(case.beams, 0), found.tokens], dim=1)
        logits = subject.logits(full)[:, prompts.shape[1] - 1 : -1]
        each = logits.double().log_softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
        counts = torch.ones_like(found.tokens, dtype=torch.bool)
        if end is not None:
            ended = (found.tokens == end).long()
            counts = (ended.cumsum(-1) - ended) == 0  # up to the end token, itself included
        lengths = counts.sum(-1)
        rescored = (each * counts).sum(-1) / lengths.double() ** case.penalty
        deaf = end is not None and bool((found.tokens[~counts] != extra["pad_token_id"]).any())
        # a log-probability is off by at most twice what its logits are off by
        bound = 2 * tolerance.allowed(subject.noise, logits) * float((lengths / lengths.double() ** case.penalty).max())
        ctx.equal(
            found.scores.double(),
            rescored,
            "a beam's score differs from its rescored log-probability",
            allowed=bound,
            axes=("beam",),
            hint=GOES_ON
            if deaf
            else Hint(
                "the cache was not reordered with the beams, scores were added up before log_softmax, or the length "
                "penalty divides by another length",
                "generation.beam_score_wrong",
                "cache.not_reordered",
            ),
        )
