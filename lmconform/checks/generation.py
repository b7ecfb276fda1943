"""generation: generate() says what forward() says, and stops when told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.generation_steps import why_not_plain
from lmconform.context import Hint, Violation
from lmconform.conventions import first_line
from lmconform.measuring.encoding import Encoder
from lmconform.measuring.generating import Generator, pad_for
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

OPENINGS = (
    "Once upon a time there was a little", "The cat sat on the", "one day she", "It is a big red", "they went home and",
    "he said", "A bird found the old", "yes",
)  # fmt: skip
CACHED = (*COMPARES_LOGITS, "cache.decode")  # what forward() does wrong with a cache, generate() repeats


@register_check(
    "generation.greedy",
    holds="generate(greedy) equals an argmax loop over plain forwards; at a first divergence the two logits are "
    "compared, a tie excused",
    needs=("gen",),
    requires=CACHED,
    profile="smoke",
    space={"batch": Span(1, 3), "time": Span(1, 64), "new": Span(1, 24)},
    grid=(
        {"batch": 1, "time": 1, "new": 4},
        {"batch": 2, "time": 13, "new": 5},
        {"batch": 2, "time": 28, "new": 8},
        {"batch": 1, "time": 62, "new": 4},
    ),
)
def check_greedy(subject: Specimen, ctx: Context) -> None:
    """Every generated token must be the argmax of a forward without cache over the tokens before it."""
    generator = Generator(subject)
    for case in ctx.cases():
        new = min(case.new, subject.longest(128) - 1)
        ids = ctx.ids(case.batch, subject.longest(case.time + new) - new)
        made, chosen_from = generator.greedy_with_logits(ids, new)
        _whole(subject, ctx, made, new)
        try:
            _expect_argmax(
                subject, ctx, ids, made, "greedy generate() leaves the argmax of plain forwards", "",
                logits=chosen_from, beside="logits inside generate() differ from those of plain forwards",
            )  # fmt: skip
        except Violation as violation:
            violation.hint = why_not_plain(subject, ctx, ids, new)
            raise


@register_check(
    "generation.batch",
    holds="left-padded batch generation equals one by one",
    needs=("gen", "mask"),
    requires=(*CACHED, "padding.left", "padding.cached", "generation.greedy"),
    space={"shortest": Span(1, 12), "step": Span(1, 9), "rows": Span(2, 4), "new": Span(1, 12)},
    grid=(
        {"shortest": 1, "step": 1, "rows": 2, "new": 2},
        {"shortest": 2, "step": 5, "rows": 4, "new": 6},
    ),
)
def check_batch(subject: Specimen, ctx: Context) -> None:
    """Prompts of different length, padded on the left; each row against plain forwards over that row alone."""
    import torch

    generator = Generator(subject)
    generator.require("attention_mask")
    for case in ctx.cases():
        lengths = [case.shortest + case.step * row for row in range(case.rows)]
        longest = subject.longest(lengths[-1])
        lengths = [min(length, longest) for length in lengths]
        ids = ctx.ids(case.rows, longest)
        pad = pad_for(subject, ids)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            ids[row, : longest - length] = pad
            mask[row, : longest - length] = 0
        extra: dict[str, Any] = {"pad_token_id": pad} if generator.offers("pad_token_id") else {}
        made, chosen_from = generator.greedy_with_logits(ids, case.new, mask=mask, **extra)
        _whole(subject, ctx, made, case.new)
        hint = Hint(
            "in every step of generate(): the attention_mask must reach forward() and grow by one, and position_ids "
            "must not count padding (attention_mask.cumsum(-1) - 1)",
            "generation.inputs_differ",
            "mask.padding_ignored",
            "position.ignores_mask",
            "generation.mask_hidden",
        )
        for row, length in enumerate(lengths):
            _expect_argmax(
                subject, ctx, ids[row : row + 1, longest - length :], made[row : row + 1],
                "a left-padded row of a batch is continued with other tokens than the same prompt alone", hint,
                where=f"row {row} with {longest - length} pads",
                logits=None if chosen_from is None else chosen_from[row : row + 1],
                beside="a left-padded row of a batch gets other logits in generate() than the same prompt alone",
            )  # fmt: skip


@register_check(
    "generation.non_empty",
    holds="from an ordinary prompt at least one new token that is not EOS is possible and sampled",
    needs=("gen",),
    profile="smoke",
    requires=("contract.shape", "contract.finite"),
    space={"time": Span(1, 16), "sample": Choice(True, False)},
    grid=({"time": 6, "sample": True}, {"time": 6, "sample": False}),
)
def check_non_empty(subject: Specimen, ctx: Context) -> None:
    """Ordinary prompts with the model's own generation defaults, its own end-of-text token in force.

    Several of them, for random weights may well end any single one.
    """
    generator = Generator(subject)
    ends = _end_tokens(subject)
    for case in ctx.cases():
        prompts = _prompts(subject, ctx, 16, case.time)
        tokens, shares = [], []
        for ids in prompts:
            made = generator.as_users_call(ids, 4, sample=case.sample)
            _inside_vocabulary(subject, ctx, made)
            tokens += [token for token in made.flatten().tolist() if token not in ends]
            shares += subject.logits(ids)[:, -1].softmax(-1)[:, ends].sum(-1).tolist()
        share = sum(shares) / len(shares)
        if not tokens:
            cause = Hint(
                "the end-of-text token outweighs all others after an ordinary prompt", "generation.eos_dominates"
            )
            if all(int(token) in ends for ids in prompts for token in ids[:, -1]):
                cause = Hint(
                    "the tokenizer ends the prompt with the end-of-text token: encode with add_special_tokens=False",
                    "generation.prompt_has_eos",
                )
            elif share < 0.5:
                cause = Hint(
                    "forward() gives other tokens a chance, generate() does not: look at its processors and stops",
                    "generation.stop_ignored",
                    "generation.control_wrong",
                )
            ctx.fail(
                f"generate() added nothing to any of {len(shares)} ordinary prompts: the first new token is always "
                f"end-of-text, which forward() gives probability {share:.3g} on average",
                where="sampling" if case.sample else "greedy", hint=cause,
            )  # fmt: skip
        if share > 0.25:
            ctx.note(f"end-of-text has probability {share:.2g} right after an ordinary prompt")


@register_check(
    "generation.stops",
    holds="EOS, max_new_tokens and stop strings end it; nothing after EOS but padding",
    needs=("gen",),
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={
        "kind": Choice("max_new_tokens", "eos", "eos_list", "stop_strings"),
        "rows": Span(1, 4), "new": Span(1, 10), "at": Span(0, 6),
    },
    grid=(
        {"kind": "max_new_tokens", "rows": 2, "new": 1, "at": 0},
        {"kind": "max_new_tokens", "rows": 2, "new": 7, "at": 0},
        {"kind": "eos", "rows": 1, "new": 8, "at": 0},
        {"kind": "eos", "rows": 3, "new": 8, "at": 2},
        {"kind": "eos_list", "rows": 3, "new": 8, "at": 1},
        {"kind": "stop_strings", "rows": 1, "new": 8, "at": 2},
    ),
)  # fmt: skip
def check_stops(subject: Specimen, ctx: Context) -> None:
    """A token that greedy decoding is known to reach is declared to be the end; the rest must be padding."""
    generator = Generator(subject)
    ran = False
    for case in ctx.cases():
        ids = ctx.ids(case.rows, 5)
        new = min(case.new, subject.longest(128) - 5)
        free = generator.greedy(ids, new)
        if free.shape[1] != new:
            ctx.fail(
                f"generate() gave {free.shape[1]} new tokens where max_new_tokens={new} and nothing else ends it",
                hint=Hint(
                    "max_new_tokens counts new tokens only: not the prompt, and not one more or less",
                    "generation.stop_ignored",
                ),
            )
        at = min(case.at, new - 1)
        if case.kind == "max_new_tokens":
            ran = True
        elif case.kind == "stop_strings":
            ran = _stop_strings(subject, ctx, generator, ids[:1], free[:1], at) or ran
        elif generator.offers("eos_token_id") and (generator.offers("pad_token_id") or case.rows == 1):
            ends = [int(free[0, at])]
            if case.kind == "eos_list":
                if not generator.hugging_face:
                    continue
                ends.append(int(free[-1, min(at + 2, new - 1)]))
            _expect_end(subject, ctx, generator, ids, free, ends)
            ran = True
    if not ran:
        ctx.not_applicable("no tokenizer was given, or generate() takes no such way of stopping")


@register_check(
    "generation.no_mask",
    holds="works when no attention_mask is passed; forward's signature shows what generate() looks for",
    needs=("gen",),
    requires=COMPARES_LOGITS,
    space={"rows": Span(1, 3), "time": Span(1, 12), "pads": Span(0, 4)},
    grid=({"rows": 2, "time": 5, "pads": 0}, {"rows": 2, "time": 6, "pads": 3}),
)
def check_no_mask(subject: Specimen, ctx: Context) -> None:
    """The mask left out, without and with padding in the prompt, against the mask spelt out.

    generate() of transformers makes the missing mask from the padding token, but only for a forward() in whose
    signature it finds attention_mask: a wrapper with (*args, **kwargs) hides it.
    """
    import torch

    generator = Generator(subject)
    generator.require("attention_mask")
    new = 4
    for case in ctx.cases():
        ids = ctx.ids(case.rows, case.time + case.pads)
        pad = pad_for(subject, ids)
        mask = torch.ones_like(ids)
        if case.pads and generator.hugging_face:
            ids[0, : case.pads] = pad
            mask[0, : case.pads] = 0
        extra: dict[str, Any] = {"pad_token_id": pad} if generator.offers("pad_token_id") else {}
        try:
            spelt_out, chosen_from = generator.greedy_with_logits(ids, new, mask=mask, **extra)
        except (TypeError, ValueError) as error:
            if subject.can("mask"):
                raise
            ctx.not_applicable(f"forward() takes no attention_mask ({first_line(error)[:120]})")
        shown = f"forward({', '.join(_parameter_names(subject))})"
        hint = Hint(
            f"generate() looks for attention_mask in the signature of forward(), which reads {shown}: name it there "
            "(functools.wraps keeps a wrapped signature), and make a mask of ones where None arrives",
            "generation.mask_hidden",
        )
        try:
            left_out, others = generator.greedy_with_logits(ids, new, **extra)
        except Exception as error:
            ctx.fail(
                f"generate() without an attention_mask raises {type(error).__name__}: {first_line(error)}", hint=hint
            )
        what = "a prompt with padding and its pad_token_id" if case.pads else "a prompt without padding"
        _expect_same(
            subject, ctx, ids, mask, left_out, spelt_out,
            f"generate() on {what} gives other tokens without attention_mask than with it", hint,
        )  # fmt: skip
        if chosen_from is None or others is None:
            continue
        # a tie may part the tokens: up to there both have read the same, and what they chose from is compared
        parted = (left_out != spelt_out).any(0).nonzero().flatten().tolist()
        steps = min([*parted, new - 1]) + 1
        ctx.equal(
            others[:, :steps], chosen_from[:, :steps],
            f"generate() on {what} chooses from other logits without attention_mask than with it",
            hint=hint, axes=("row", "step", "token"),
        )  # fmt: skip


# -- what several of them need -----------------------------------------------------------------------------------------


def _whole(subject: Specimen, ctx: Context, made: Tensor, new: int) -> Tensor:
    """The new tokens, if there are as many as asked for and all are in the vocabulary."""
    if made.shape[1] != new:
        ctx.fail(
            f"generate() gave {made.shape[1]} new tokens, asked for {new}, and no end-of-text token is set",
            hint=Hint(
                "it stops by itself or counts the prompt, or it does not return the prompt it was given",
                "generation.eos_dominates",
                "generation.stop_ignored",
            ),
        )
    _inside_vocabulary(subject, ctx, made)
    return made


def _inside_vocabulary(subject: Specimen, ctx: Context, made: Tensor) -> None:
    outside = [token for token in made.flatten().tolist() if not 0 <= token < subject.vocab_size]
    if outside:
        ctx.fail(
            f"generate() gave the token {outside[0]}, outside the vocabulary of {subject.vocab_size}",
            hint=Hint(
                "an index into a cut-down list (top-k) was taken for a token, or an offset was added",
                "generation.ids_out_of_vocab",
            ),
        )


def _expect_argmax(
    subject: Specimen, ctx: Context, ids: Tensor, made: Tensor, message: str, hint: str, where: str = "",
    logits: Tensor | None = None, beside: str = "",
) -> None:  # fmt: skip
    """Every token of `made` [batch, new] is the argmax of a plain forward over `ids` and the tokens before it.

    One forward over everything finds the candidates; a plain forward over just the tokens before decides. `logits`,
    where generate() shows what it chose from, are compared too (`beside` is then the message): a difference counts
    before it flips a token.
    """
    import torch

    time = ids.shape[1]
    full = torch.cat([ids, made], dim=1)
    plain = subject.logits(full)[:, time - 1 : -1]
    gaps = plain.amax(-1) - plain.gather(-1, made[..., None])[..., 0]
    # the two logits of a tie may be off in opposite directions
    allowed = 2 * tolerance.allowed(subject.noise, plain)
    ctx.within(min(float(gaps.max()), allowed), allowed, message)  # a margin to record; the loop below decides
    for step, row in sorted((step, row) for row, step in (gaps > allowed).nonzero().tolist()):
        alone = subject.logits(full[row : row + 1, : time + step])[0, -1]
        best, chosen = int(alone.argmax()), int(made[row, step])
        gap = float(alone[best] - alone[chosen])
        place = f"step {step} after {time} tokens: generate() took {chosen} (logit {float(alone[chosen]):.4g}), "
        place += f"the argmax is {best} ({float(alone[best]):.4g})"
        ctx.within(gap, allowed, message, where=f"{where or f'row {row}'}, {place}", hint=hint)
    if logits is not None:
        ctx.equal(logits.to(plain), plain, beside, where=where, hint=hint, axes=("row", "step", "token"))


def _expect_same(
    subject: Specimen, ctx: Context, ids: Tensor, mask: Tensor, made: Tensor, other: Tensor, message: str, hint: str
) -> None:
    """Both are the same tokens up to a tie: where they part, plain forwards hold the two for equal."""
    import torch

    if made.shape != other.shape:
        ctx.fail(f"{message}: {list(made.shape)} and {list(other.shape)}", hint=hint)
    allowed = 2 * tolerance.allowed(subject.noise, subject.logits(ids))
    for row in range(len(ids)):
        parted = (made[row] != other[row]).nonzero().flatten().tolist()
        if not parted:
            continue
        step = parted[0]
        before = torch.cat([ids[row][mask[row].bool()], other[row, :step]])[None]
        logits = subject.logits(before)[0, -1]
        gap = float((logits[made[row, step]] - logits[other[row, step]]).abs())
        ctx.within(gap, allowed, message, where=f"row {row}, step {step}", hint=hint)
    ctx.within(0.0, allowed, message)


def _expect_end(
    subject: Specimen, ctx: Context, generator: Generator, ids: Tensor, free: Tensor, ends: list[int]
) -> None:
    """With `ends` in force each row is as `free`, generated without, up to its first end token, then padding."""
    import torch

    pad = pad_for(subject, torch.cat([ids.flatten(), free.flatten(), torch.tensor(ends, device=ids.device)]))
    extra: dict[str, Any] = {"pad_token_id": pad} if generator.offers("pad_token_id") else {}
    made = generator.greedy(ids, free.shape[1], eos_token_id=ends if len(ends) > 1 else ends[0], **extra)
    hint = Hint(
        "the test for the end token must look at the newest token of every row, and finished rows must get padding",
        "generation.stop_ignored",
    )
    rows = free.tolist()
    stops = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    named = f"end-of-text {' or '.join(map(str, ends))}"
    for row, (tokens, stop) in enumerate(zip(made.tolist(), stops, strict=True)):
        if len(tokens) < stop:
            ctx.fail(
                f"generate() ends a row after {len(tokens)} tokens, before its own end after {stop}",
                where=f"row {row}, {named}",
                hint=Hint("go on until every row has ended or has max_new_tokens", "generation.stop_ignored"),
            )
        if tokens[:stop] != rows[row][:stop]:
            ctx.fail(
                f"declaring an end-of-text token changes the tokens before it: {tokens[:stop]}, without it "
                f"{rows[row][:stop]}", where=f"row {row}, {named}", hint=hint,
            )  # fmt: skip
        rest = tokens[stop:]
        if any(token != pad for token in rest):
            ctx.fail(
                f"generate() goes on after the end-of-text token with {rest}, expected "
                f"{f'only padding ({pad})' if extra else 'nothing'}",
                where=f"row {row}, step {stop}, {named}", hint=hint,
            )  # fmt: skip
    if made.shape[1] > max(stops):
        ctx.fail(
            f"generate() went on for {made.shape[1]} steps though every row had ended after {max(stops)}",
            where=named, hint=Hint("leave the loop once all rows are finished", "generation.stop_ignored"),
        )  # fmt: skip


def _stop_strings(subject: Specimen, ctx: Context, generator: Generator, ids: Tensor, free: Tensor, at: int) -> bool:
    """A stop string that decoding is known to reach ends it; whether it could be tried."""
    tokenizer = subject.tokenizer
    if tokenizer is None or not generator.hugging_face:
        return False
    text = tokenizer.decode(free[0, : at + 1])
    wanted = tokenizer.decode(free[0, at : at + 1]).strip()
    if not wanted or wanted not in text or "\ufffd" in wanted:  # half a character of a byte-level tokenizer
        return False
    if not _spells_its_tokens(tokenizer):
        ctx.note(
            "stop strings were left out: transformers reads each token behind the letters 'abcdef', and this tokenizer "
            "does not give them back (they are no word of its vocabulary)"
        )
        return False
    made = generator.greedy(ids, free.shape[1], stop_strings=[wanted], tokenizer=tokenizer)
    reached = next(i + 1 for i in range(free.shape[1]) if wanted in tokenizer.decode(free[0, : i + 1]))
    if made.shape[1] > reached:
        ctx.fail(
            f"generate() goes on after the stop string {wanted!r}: {made.shape[1]} tokens, it was complete after "
            f"{reached}",
            hint=Hint(
                "compare the decoded tail of the text, not single tokens, with the stop strings",
                "generation.stop_ignored",
            ),
        )
    return True


def _spells_its_tokens(tokenizer: Any) -> bool:
    """Whether transformers can make stop strings of this tokenizer. The model has no part in it."""
    from transformers.generation.stopping_criteria import StopStringCriteria

    try:
        StopStringCriteria.clean_tokenizer_vocab(tokenizer)
    except ValueError:  # str.index, where the letters have become the unknown token
        return False
    return True


def _prompts(subject: Specimen, ctx: Context, rows: int, time: int) -> list[Tensor]:
    """Batches [.., time], about `rows` rows in all: ordinary texts where there is a tokenizer, else any tokens."""
    import torch

    encoder = None if subject.tokenizer is None else Encoder(subject.tokenizer)
    if encoder is not None and encoder.can_encode:
        encoded = {tuple(ids) for text in OPENINGS if (ids := encoder.encode(text))}
        if encoded:
            return [torch.tensor([ids] * (rows // len(encoded)), device=subject.device) for ids in sorted(encoded)]
        ctx.note("the tokenizer makes nothing of ordinary texts: random tokens were the prompts")
    return [ctx.ids(rows, time)]


def _end_tokens(subject: Specimen) -> list[int]:
    """Every end-of-text token that generate() stops at by default, inside the vocabulary."""
    found: list[int] = []
    for holder in (getattr(subject.module, "generation_config", None), subject.config, subject.tokenizer):
        value = holder.get("eos_token_id") if isinstance(holder, dict) else getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else []
    return sorted({token for token in found if 0 <= token < subject.vocab_size})


def _parameter_names(subject: Specimen) -> list[str]:
    import inspect

    parameters = inspect.signature(subject.module.forward).parameters.values()
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [marks.get(parameter.kind, "") + parameter.name for parameter in parameters]
