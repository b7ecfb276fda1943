"""collapse.labels: what the labels themselves would teach, read off the recipe's batches; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lmconform import structure
from lmconform.checks.split_overlap import BATCHES, LONG, Finding, Specials, leak, padding_of
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.encoding import Encoder, as_ids
from lmconform.recipe import WORDS, Batch
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.recipe import Recipe
    from lmconform.specimen import Specimen

IGNORED = -100
EMPTY = 0.01  # of the examples: a stray blank line is no pollution
AGREE = 0.75  # of the labels: some recipes put noise into their inputs, and sentences of one kind are alike by chance
WRAPPED = 0.9  # of the rows: a single match is chance
REASONS = {
    1: "each position learns the token after the next",
    0: "each position learns to repeat the token it has just read",
}


@register_check(
    "collapse.labels",
    holds="the labels are the inputs' next tokens, once, without padding, with the end, and not those of validation",
    needs=("recipe",),
    requires=(),
    profile="smoke",
)
def check_labels(subject: Specimen, ctx: Context) -> None:
    """EOS and padding among the labels, empty examples, rolled, unshifted or repeated targets, leaks between splits.

    A model learns what its labels say: one report's model emitted the end token with 97.9 %, because rolled labels and
    padding had made it the answer for every empty line, and because its prompt ended in that token.
    """
    recipe = subject.recipe
    specials = _specials(subject, recipe)
    findings: list[Finding | None] = []
    has_data = recipe.batches is not None or (recipe.texts is not None and recipe.collate is not None)
    if not has_data and recipe.encode_prompt is None:
        ctx.not_applicable(f"the recipe gives no {WORDS['batches']}")
    if has_data:
        try:
            batches = recipe.read(BATCHES)
        except (TypeError, ValueError) as error:
            ctx.fail(f"the batches cannot be read: {first_line(error)}")
        if not batches:
            ctx.fail("the recipe's batches are empty: there is nothing to learn from")
        _check_legal(subject, ctx, batches)
        labelled = [batch for batch in batches if batch.labels is not None]
        if labelled:
            findings += _of_labels(subject, ctx, recipe, labelled, specials)
        else:
            ctx.note("the batches hold no labels: only the inputs were looked at")
        findings.append(leak(ctx, recipe, batches, specials))
    findings.append(_prompt(subject, ctx, recipe, specials))
    found = [finding for finding in findings if finding is not None]
    for other in found[1:]:
        ctx.note(f"also: {other.message} ({other.hint})")
    if found:
        first = found[0]
        ctx.fail(first.message, where=first.where, hint=first.hint, measured=first.measured, allowed=first.allowed)


def _of_labels(
    subject: Specimen, ctx: Context, recipe: Recipe, batches: list[Batch], specials: Specials
) -> list[Finding | None]:
    offset, share = _alignment(batches, specials)
    shifts = _loss_shifts(subject, recipe)
    live = sum(int((batch.labels != IGNORED).sum()) for batch in batches if batch.labels is not None)
    if live == 0:
        hint = Hint("the mask for the labels is inverted", "data.empty_examples")
        return [Finding("no label counts at all: every one is -100", hint)]
    ctx.note(
        f"{live} labels in {len(batches)} batches, "
        + ("unrelated to the inputs" if offset is None else f"{'not yet' if offset == 0 else 'already'} shifted")
    )
    return [
        _rolled(batches, specials),
        _misaligned(offset, share, shifts),
        _pollution(batches, specials, offset) if offset in (0, 1) else None,
        _empty(batches, specials),
        _end_masked(ctx, batches, specials),
        _repeated(ctx, batches),
    ]


def _specials(subject: Specimen, recipe: Recipe) -> Specials:
    """From the tokenizer, else from the model's config."""
    tokenizer = recipe.tokenizer if recipe.tokenizer is not None else subject.tokenizer
    found: dict[str, int | None] = {}
    stated = structure.special_ids(subject.module)
    encoder = None if tokenizer is None else Encoder(tokenizer)
    for role in ("pad", "bos", "eos", "unk"):
        found[role] = stated.get(f"{role}_token_id") if encoder is None else encoder.special(role)
    return Specials(**found)


def _check_legal(subject: Specimen, ctx: Context, batches: list[Batch]) -> None:
    for number, batch in enumerate(batches):
        where = f"batch {number}"
        if batch.labels is not None and batch.labels.shape != batch.ids.shape:
            ctx.fail(
                f"labels are {list(batch.labels.shape)} and ids {list(batch.ids.shape)}: one label a position",
                where=where,
                hint="give both the same length; a label that is missing is -100",
            )
        for what, values in (("ids", batch.ids), ("labels", batch.labels)):
            if values is None or values.numel() == 0:
                continue
            real = values[values != IGNORED] if what == "labels" else values
            wrong = real[(real < (-1 if what == "labels" else 0)) | (real >= subject.vocab_size)]
            if wrong.numel():
                ctx.fail(
                    f"{what} hold {int(wrong[0])}, which is no token of the model ({subject.vocab_size})",
                    where=where,
                    hint=Hint(
                        "the tokenizer is larger than the model's vocabulary, or another tokenizer made the data",
                        "tokenizer.ids_out_of_range",
                    ),
                )


# -- alignment -------------------------------------------------------------------------------------------------------


def _alignment(batches: list[Batch], specials: Specials) -> tuple[int | None, float]:
    """At which offset labels[t] is ids[t + offset], and for which share of the labels; None where at none."""
    best: tuple[int | None, float] = (None, 0.0)
    for offset in (0, 1, 2, -1):
        equal = total = 0
        for batch in batches:
            labels, ids = cast("Tensor", batch.labels), batch.ids
            time = ids.shape[1]
            if time <= abs(offset):
                continue
            mine = labels[:, : time - offset] if offset >= 0 else labels[:, -offset:]
            theirs = ids[:, offset:] if offset >= 0 else ids[:, :offset]
            padded = padding_of(batch, specials)
            live = (mine != IGNORED) & ~(padded[:, offset:] if offset >= 0 else padded[:, :offset])
            equal += int(((mine == theirs) & live).sum())
            total += int(live.sum())
        share = equal / total if total else 0.0
        if share > best[1]:
            best = offset, share
    return best if best[1] > AGREE else (None, best[1])


def _loss_shifts(subject: Specimen, recipe: Recipe) -> bool | None:
    """Whether the loss (the recipe's, else the model's) shifts: found by where one label's gradient falls."""
    import torch

    if recipe.loss is None:
        return subject.convention.labels_shifted if subject.convention.labels else None
    at = 3
    logits = torch.zeros(1, 6, subject.vocab_size).normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.full((1, 6), IGNORED)
    labels[0, at] = 1
    try:
        (grad,) = torch.autograd.grad(recipe.loss(logits, labels), [logits])
    except (RuntimeError, ValueError, IndexError):  # a loss of another form; loss.smoothing looks at it
        return None
    felt = grad.abs().sum(-1)[0].nonzero().flatten().tolist()
    return True if felt == [at - 1] else False if felt == [at] else None


def _misaligned(offset: int | None, share: float, shifts: bool | None) -> Finding | None:
    if offset is None:
        return Finding(
            f"labels are not the inputs at any shift (at best {share:.0%} of them agree)",
            Hint("labels and inputs were shuffled apart, or come from different rows", "data.rolled_labels"),
        )
    if offset == -1:
        return Finding(
            "labels are the tokens before the inputs, shifted the wrong way: each position learns what it has seen",
            Hint("torch.roll(ids, 1) goes to the right; the next token is ids[:, 1:]", "data.rolled_labels"),
        )
    if offset == 2 or (offset == 1 and shifts):
        return Finding(
            "labels are shifted twice: the data shifts them and the loss shifts again, so that " + REASONS[1]
            if offset == 1
            else "labels are the inputs shifted by two: the data shifts twice",
            Hint(
                "shift once: labels = input_ids where the model (or the loss) shifts, as transformers' models do",
                "data.rolled_labels",
                "loss.double_shift",
            ),
        )
    if offset == 0 and shifts is False:
        return Finding(
            "labels are the inputs, and the loss does not shift them: " + REASONS[0],
            Hint(
                "shift in one place: labels[:, :-1] = ids[:, 1:] in the data, or logits[:, :-1] with labels[:, 1:] in "
                "the loss (transformers' Trainer does not shift for classes of one's own when it smooths labels)",
                "data.rolled_labels",
                "loss.unshifted",
            ),
        )
    return None


def _rolled(batches: list[Batch], specials: Specials) -> Finding | None:
    """The last label is the row's own first token: torch.roll wraps around."""
    wrapped = rows = 0  # rows whose last token is their first say nothing
    firsts: set[int] = set()
    after_end = 0
    for batch in batches:
        labels, ids = cast("Tensor", batch.labels), batch.ids
        if ids.shape[1] < 3:
            continue
        last = labels[:, -1]
        live = last != IGNORED
        telling = ids[:, -1] != ids[:, 0]
        same = live & (last == ids[:, 0]) & telling
        wrapped += int(same.sum())
        rows += int(telling.sum())
        firsts |= set(ids[:, 0].tolist())
        ends = padding_of(batch, specials)[:, -1]
        if specials.eos is not None:
            ends = ends | (ids[:, -1] == specials.eos)
        after_end += int((same & ends).sum())
    # rows that all begin with BOS may be blocks of one stream, where BOS does follow; not behind padding or the end
    if rows >= 3 and wrapped >= WRAPPED * rows and (len(firsts) > 1 or after_end > 0):
        return Finding(
            f"labels are rolled: in {wrapped} of {rows} rows the last label is the row's own first token",
            Hint(
                "torch.roll(ids, -1) wraps around, and carries padding along: labels[:, :-1] = ids[:, 1:], the last "
                "and every one on padding -100",
                "data.rolled_labels",
            ),
            measured=wrapped / rows,
            where="last position",
        )
    return None


# -- padding, ends, emptiness ----------------------------------------------------------------------------------------


def _pollution(batches: list[Batch], specials: Specials, offset: int) -> Finding | None:
    """Labels that count although the token they stand for is padding."""
    import torch

    polluted = live = ends = padding = 0
    for batch in batches:
        labels, padded = cast("Tensor", batch.labels), padding_of(batch, specials)
        own = padded
        if offset == 1:  # the label of t is the token of t + 1; behind the last it is padding if the last is
            own = torch.cat([padded[:, 1:], padded[:, -1:]], dim=1)
            own = own & ~_ends_of_shifted(batch, padded, specials)
        counted = labels != IGNORED
        polluted += int((counted & own).sum())
        ends += _count(labels, counted & own, specials.eos)
        padding += _count(labels, counted & own, specials.pad)
        live += int(counted.sum())
    if not polluted:
        return None
    what = "EOS" if ends >= polluted / 2 else "padding" if padding >= polluted / 2 else "other tokens"
    return Finding(
        f"padding counts as a label: {polluted / live:.1%} of the labels stand on padding and say {what}",
        Hint(
            "labels on padding must be -100: a model that is taught what follows the end learns to end at once "
            "(labels.masked_fill(attention_mask == 0, -100))",
            "data.eos_pollution",
        ),
        measured=polluted / live,
        allowed=0.0,
    )


def _ends_of_shifted(batch: Batch, padded: Tensor, specials: Specials) -> Tensor:
    """Labels behind a row's last real token that are no padding: inputs and labels were padded after the shift.

    There the label says something else than the padding beside it, or says the end, once, after a text without one.
    """
    import torch

    labels, ids = cast("Tensor", batch.labels), batch.ids
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, -1:], IGNORED)], dim=1)
    kept = labels != following
    if specials.eos is not None:
        kept = kept | ((labels == specials.eos) & (ids != specials.eos))
    return kept & ~padded


def _count(labels: Tensor, where: Any, token: int | None) -> int:
    return 0 if token is None else int(((labels == token) & where).sum())


def _empty(batches: list[Batch], specials: Specials) -> Finding | None:
    rows = empty = 0
    for batch in batches:
        labels = cast("Tensor", batch.labels)
        ordinary = (labels != IGNORED) & ~padding_of(batch, specials)
        for token in specials.known():
            ordinary = ordinary & (labels != token)
        rows += len(labels)
        empty += int((~ordinary.any(-1)).sum())
    if empty <= EMPTY * rows:
        return None
    return Finding(
        f"{empty} of {rows} examples are empty: their labels hold no ordinary token",
        Hint(
            "blank lines of the corpus became examples of start and end alone, or a prompt fills the whole length and "
            "its answer was cut off: leave them out",
            "data.empty_examples",
        ),
        measured=empty / rows,
        allowed=EMPTY,
    )


def _end_masked(ctx: Context, batches: list[Batch], specials: Specials) -> Finding | None:
    """EOS stands in the inputs as the end of a text and is never a label."""
    if specials.eos is None:
        return None
    inside = labelled = 0
    for batch in batches:
        real = (batch.ids == specials.eos) & ~padding_of(batch, specials)
        inside += int(real[:, 1:].sum())
        labelled += _count(cast("Tensor", batch.labels), batch.labels != IGNORED, specials.eos)
    if not inside:
        ctx.note("no example holds EOS: a model trained on this never ends a text of itself")
    if labelled or not inside:
        return None
    return Finding(
        f"every EOS is masked away: it ends {inside} texts in the inputs and is no label once",
        Hint(
            "pad is eos, and labels equal to pad were set to -100: give padding a token of its own, or mask by "
            "attention_mask"
            if specials.pad == specials.eos
            else "labels are -100 on special tokens: the end is what teaches a model to stop",
            "tokenizer.pad_is_eos",
        ),
        measured=0.0,
    )


# -- repetition and leaks --------------------------------------------------------------------------------------------


def _repeated(ctx: Context, batches: list[Batch]) -> Finding | None:
    """One target for different inputs; the same example again is only noted (epochs do that)."""
    inputs: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    rows = 0
    for batch in batches:
        for ids, labels in zip(batch.ids.tolist(), cast("Tensor", batch.labels).tolist()):
            live = tuple(label for label in labels if label != IGNORED)
            if len(live) >= LONG:
                inputs.setdefault(live, []).append(tuple(ids))
                rows += 1
    if not rows:
        return None
    mixed = sum(len(own) for own in inputs.values() if len(set(own)) > 1)
    if mixed > 0.1 * rows:
        return Finding(
            f"{mixed} of {rows} examples share their targets with another input",
            Hint(
                "the labels of one row were expanded over the batch, or a buffer is filled in place and handed out "
                "again",
                "data.rolled_labels",
            ),
            measured=mixed / rows,
            allowed=0.1,
        )
    again = rows - sum(len(set(own)) for own in inputs.values())
    if again > 0.1 * rows:
        ctx.note(f"{again} of {rows} examples occur more than once")
    return None


def _prompt(subject: Specimen, ctx: Context, recipe: Recipe, specials: Specials) -> Finding | None:
    """A prompt that ends in EOS: generation starts behind the end. By encode_prompt, else the tokenizer's default."""
    tokenizer: Any = recipe.tokenizer if recipe.tokenizer is not None else subject.tokenizer
    text = "once upon a time there was"
    if recipe.texts is not None and len(recipe.texts) and isinstance(recipe.texts[0], str):
        text = " ".join(recipe.texts[0].split()[:4]) or text
    try:
        if recipe.encode_prompt is not None:
            ids = as_ids(recipe.encode_prompt(text))
        elif tokenizer is not None and (encoder := Encoder(tokenizer)).can_encode:
            ids = encoder.encode(text)
        else:
            return None
    except Exception as error:
        ctx.note(f"the prompt {text!r} cannot be encoded: {type(error).__name__}: {first_line(error)}")
        return None
    if specials.eos is None or not ids or ids[-1] != specials.eos or len(ids) == 1:
        return None
    return Finding(
        f"a prompt is encoded with the end token behind it: {text!r} ends in {specials.eos} (EOS)",
        Hint(
            "generation starts after the end of a text, so the model ends at once: encode prompts with "
            "add_special_tokens=False (and say so: Recipe(encode_prompt=...)), or add EOS in the collator only",
            "generation.prompt_has_eos",
        ),
        where="encode_prompt" if recipe.encode_prompt is not None else "the tokenizer's default",
    )
