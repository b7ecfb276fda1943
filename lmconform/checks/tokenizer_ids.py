"""tokenizer.specials, tokenizer.padding, tokenizer.bounds: special tokens, and ids that the model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import structure
from lmconform.checks.tokenizer import FRESH, TEXTS, encoder_of, ids_of, shortened
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.encoding import Encoder
from lmconform.registry import register_check

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "tokenizer.specials",
    holds="one BOS, special tokens are known by their ids, and the model's end token is the tokenizer's",
    needs=("tok",),
    requires=(),
    profile="smoke",
)
def check_specials(subject: Specimen, ctx: Context) -> None:
    """Twice the same start token shifts every position of a model that was trained with one.

    Source: llama.cpp and vLLM both warn of a doubled BOS; a config whose eos_token_id is not the tokenizer's never
    stops.
    """
    encoder = encoder_of(subject, ctx)
    specials = encoder.specials()
    bos, eos = specials.get("bos"), specials.get("eos")
    for text in (FRESH[0], TEXTS[1], ""):
        ids = ids_of(ctx, encoder, text, None)
        if bos is not None and bos != eos and ids.count(bos) > 1:
            ctx.fail(
                f"a text is encoded with {ids.count(bos)} start tokens (BOS, {bos}), expected one at most",
                where=f"encode({shortened(text)}) = {shortened(ids)}",
                hint=Hint(
                    "the post-processor adds BOS and so does the code around it (add_bos_token, a template, "
                    "encode() itself): leave one",
                    "tokenizer.double_bos",
                ),
            )
        if eos is not None and eos != bos and ids.count(eos) > 1:
            ctx.fail(
                f"a text is encoded with {ids.count(eos)} end tokens (EOS, {eos}), expected one at most",
                where=f"encode({shortened(text)}) = {shortened(ids)}",
                hint=Hint(
                    "the post-processor adds EOS and so does the code around it: leave one", "tokenizer.double_bos"
                ),
            )
    _check_template(ctx, encoder, bos)
    vocabulary = encoder.vocabulary()
    for role, token in specials.items():
        spelt = getattr(subject.tokenizer, f"{role}_token", None)
        if isinstance(spelt, str) and spelt in vocabulary and vocabulary[spelt] != token:
            ctx.fail(
                f"{role}_token_id is {token}, but {spelt!r} has id {vocabulary[spelt]}",
                where=role,
                hint="the vocabulary was rebuilt or sorted anew after the special ids had been fixed",
            )
    if (unk := specials.get("unk")) is not None and unk in (specials.get("pad"), None) and unk not in (bos, eos):
        ctx.note(f"unknown words and padding share token {unk}: masking the padding masks unknown words too")
    _check_stated(subject, ctx, encoder, specials)


def _check_template(ctx: Context, encoder: Encoder, bos: int | None) -> None:
    """A chat template that writes BOS, encoded with the default flags, gives two: documented, so only noted."""
    if bos is None or not getattr(encoder.tokenizer, "chat_template", None):
        return
    try:
        text = encoder.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    except Exception as error:
        ctx.note(f"its chat template raises {type(error).__name__}: {first_line(error)}")
        return
    if encoder.encode(text).count(bos) > 1:
        ctx.note("its chat template writes BOS itself: encode the rendered text with add_special_tokens=False")


def _check_stated(subject: Specimen, ctx: Context, encoder: Encoder, specials: dict[str, int]) -> None:
    config, generation = subject.config, getattr(subject.module, "generation_config", None)
    for role in ("eos", "bos", "pad"):
        stated: set[int] = set()
        for holder in (config, generation):
            value = getattr(holder, f"{role}_token_id", None)
            stated |= {value} if isinstance(value, int) else set(value or ())
        own = specials.get(role)
        if not stated or own is None or own in stated:
            continue
        text = f"the model's config says {role}_token_id {sorted(stated)}, the tokenizer's is {own}"
        if role == "eos":
            ctx.fail(
                text,
                where=f"eos, {encoder.name}",
                hint=Hint(
                    "generate() waits for a token that the model was never taught to end with: set "
                    "model.config.eos_token_id and model.generation_config.eos_token_id from the tokenizer",
                    "generation.stop_ignored",
                    "tokenizer.ids_out_of_range",
                ),
            )
        ctx.note(text)


@register_check(
    "tokenizer.padding",
    holds="padding has a token of its own: pad is not eos",
    needs=("tok",),
    requires=(),
    profile="smoke",
    severity="warning",
)
def check_padding(subject: Specimen, ctx: Context) -> None:
    """Many released tokenizers have no pad token and tutorials set pad_token = eos_token.

    That is harmless as long as nobody derives labels or a mask from the pad id; collapse.labels looks at the labels
    themselves and fails where the end token is masked away.
    """
    encoder = encoder_of(subject, ctx)
    pad, eos = encoder.special("pad"), encoder.special("eos")
    if pad is None:
        ctx.not_applicable("it has no pad token")
    if pad == eos:
        ctx.fail(
            f"padding and the end of text are one token ({pad})",
            where="pad_token_id == eos_token_id",
            hint=Hint(
                "a collator that sets labels equal to pad to -100 (DataCollatorForLanguageModeling does) masks every "
                "end away, and the model never learns to stop; give padding a token of its own, or mask by "
                "attention_mask",
                "tokenizer.pad_is_eos",
            ),
        )


@register_check(
    "tokenizer.bounds",
    holds="every id that the tokenizer can give is below the model's vocabulary size",
    needs=("tok",),
    requires=(),
    profile="smoke",
)
def check_bounds(subject: Specimen, ctx: Context) -> None:
    """The whole vocabulary, the added tokens, and what encode() gives for texts of several scripts."""
    encoder = encoder_of(subject, ctx)
    given: dict[int, str] = {token: f"{name!r}" for name, token in encoder.vocabulary().items()}
    for role, token in encoder.specials().items():
        given.setdefault(token, role)
    for text in TEXTS:
        for token in ids_of(ctx, encoder, text, None):
            given.setdefault(token, f"in {shortened(text)}")
    beyond = sorted(token for token in given if not 0 <= token < subject.vocab_size)
    if beyond:
        worst = beyond[-1] if beyond[-1] >= 0 else beyond[0]
        shown = ", ".join(f"{token} ({given[token]})" for token in [*beyond[:2], worst][: len(beyond)])
        ctx.fail(
            f"the tokenizer gives {len(beyond)} ids that the model has no embedding for: {shown}; the model has "
            f"{subject.vocab_size}",
            where=f"id {worst}",
            measured=worst if worst >= 0 else None,
            allowed=subject.vocab_size - 1 if worst >= 0 else None,
            hint=Hint(
                "tokens were added after the model was made: model.resize_token_embeddings(len(tokenizer)); or the "
                "model was built with another tokenizer's vocab_size (vocab_size leaves added tokens out: use "
                "len(tokenizer))",
                "tokenizer.ids_out_of_range",
            ),
        )
    rows = structure.stated(subject.module, ("vocab_size",)) or subject.vocab_size
    if given and rows > 2 * (max(given) + 1) and rows > max(given) + 1024:
        ctx.note(f"the model has {rows} tokens and the tokenizer uses {max(given) + 1} of them")
    if given:
        ctx.within(max(given), subject.vocab_size - 1, "the largest id", where="id")
