"""tokenizer: text and ids go both ways as stated, and the ids are ones that the model has."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.encoding import Encoder, EncodingError, as_ids
from lmconform.registry import register_check

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen

FRESH = (  # each is used by one part of one check only, so that a cache is cold where it should be
    "the little cat sat down.",
    "a big dog ran to the house",
    "she said yes, and they all went home!",
    "one day the old man saw a red bird",
    "what is it? it is a tree.",
)
TEXTS = (
    "the cat sat on the mat.",
    "Once upon a time, there was a King; he had 3 sons!",
    "it's 12:30, isn't it? (yes) - well-known \"words\"",
    "two  spaces, a\ttab\nand a new line\n",
    "naïve café Ünïcödé 東京 привет 🙂",
    "x",
    "word " * 40,
)


@register_check(
    "tokenizer.flags",
    holds="add_special_tokens and skip_special_tokens are honoured, also on the second call and whatever came before",
    needs=("tok",),
    requires=(),
    profile="smoke",
)
def check_flags(subject: Specimen, ctx: Context) -> None:
    """The same text with the flag one way and the other, in both orders, each order with texts it has not seen.

    A cache of encodings keyed by the text alone answers the second call with the first one's ids. Source: the reports
    of a model that stopped at once because its prompt was encoded with the end token in spite of the flag.
    """
    encoder = encoder_of(subject, ctx)
    specials = set(encoder.specials().values()) - {encoder.special("unk")}
    plain = ids_of(ctx, encoder, FRESH[0], False) if encoder.takes_add else ids_of(ctx, encoder, FRESH[0], None)
    found = sorted(specials & set(plain))
    if found and not encoder.takes_add:
        ctx.fail(
            f"encode() always puts special tokens in ({_named(encoder, found)}) and takes no add_special_tokens",
            where=f"encode({FRESH[0]!r}) = {plain}",
            hint=Hint(
                "a prompt must not end in the end token: add the flag, and leave the special tokens off where it is "
                "False",
                "tokenizer.flags_ignored",
                "generation.prompt_has_eos",
            ),
        )
    if found:
        ctx.fail(
            f"special tokens are added although add_special_tokens=False ({_named(encoder, found)})",
            where=f"encode({FRESH[0]!r}, add_special_tokens=False) = {plain}",
            hint=Hint(
                "the flag is taken and not looked at (or swallowed by **kwargs): build the special tokens only where "
                "it is True",
                "tokenizer.flags_ignored",
            ),
        )
    if encoder.takes_add:
        _check_order(ctx, encoder, specials)
    else:
        ctx.note(f"{encoder.name}.encode() takes no add_special_tokens, and adds none")
    _check_same_twice(ctx, encoder)
    if encoder.can_decode:
        _check_skip(ctx, encoder)


def _check_order(ctx: Context, encoder: Encoder, specials: set[int]) -> None:
    hint = Hint(
        "a cache (lru_cache, a dict) is keyed by the text alone: put every argument that changes the result into the "
        "key",
        "tokenizer.cached_flags",
    )
    ids_of(ctx, encoder, FRESH[1], True)
    after = ids_of(ctx, encoder, FRESH[1], False)
    if stale := sorted(specials & set(after)):
        ctx.fail(
            "add_special_tokens=False is ignored on the second call: the first call's special tokens come back "
            f"({_named(encoder, stale)})",
            where=f"{FRESH[1]!r} with True, then with False = {after}",
            hint=hint,
        )
    ids_of(ctx, encoder, FRESH[2], False)
    late = ids_of(ctx, encoder, FRESH[2], True)
    first = ids_of(ctx, encoder, FRESH[3], True)
    shape = [token for token in first if token in specials], [token for token in late if token in specials]
    if shape[0] != shape[1]:
        ctx.fail(
            "add_special_tokens=True is ignored on the second call: a text that was first encoded without special "
            "tokens stays without them",
            where=f"special tokens {shape[0]} on a first call, {shape[1]} after a call with False",
            hint=hint,
        )


def _check_same_twice(ctx: Context, encoder: Encoder) -> None:
    given = encoder.raw(FRESH[4])
    first = as_ids(given)
    if isinstance(given, list) and given and isinstance(given[0], int):
        given.append(given[0])  # as a caller does who adds the end token in place
    second = encoder.encode(FRESH[4])
    if first != second:
        grown = len(second) == len(first) + 1
        ctx.fail(
            "a caller that changes the ids it was given changes the next answer for the same text"
            if grown
            else "the same text encoded twice gives different ids",
            where=f"first {first}, then {second}",
            hint=Hint("the cache hands out its own list: return a copy (list(ids))", "tokenizer.cached_flags")
            if grown
            else Hint(
                "something is carried from call to call: padding or truncation left switched on, a growing vocabulary",
                "tokenizer.cached_flags",
            ),
        )


def _check_skip(ctx: Context, encoder: Encoder) -> None:
    ids = ids_of(ctx, encoder, FRESH[0], False if encoder.takes_add else None)
    ends = [token for role in ("bos", "eos", "pad") if (token := encoder.special(role)) is not None]
    if not ends:
        ctx.note("it has no special tokens to skip")
        return
    dressed = [*ends[:1], *ids, *ends[1:]]
    if not encoder.takes_skip:
        ctx.note(f"{encoder.name}.decode() takes no skip_special_tokens")
        return
    kept, bare = text_of(ctx, encoder, dressed, False), text_of(ctx, encoder, ids, False)
    for turn in ("on the first call", "on the second call", "after a call with False"):
        if turn == "after a call with False":
            text_of(ctx, encoder, dressed, False)
        skipped = text_of(ctx, encoder, dressed, True)
        if skipped.split() != text_of(ctx, encoder, ids, True).split():
            ctx.fail(
                f"skip_special_tokens=True leaves special tokens in the text {turn}",
                where=f"decode({dressed}, skip_special_tokens=True) = {skipped!r}",
                hint=Hint(
                    "the flag is not looked at, or the special tokens are not registered as special",
                    "tokenizer.flags_ignored",
                )
                if turn == "on the first call"
                else Hint("a cache is keyed without the flag", "tokenizer.cached_flags"),
            )
    if kept.split() == bare.split() or text_of(ctx, encoder, dressed, False) != kept:
        ctx.fail(
            "skip_special_tokens=False drops the special tokens all the same"
            if kept.split() == bare.split()
            else "skip_special_tokens=False gives another text after a call with True",
            where=f"decode({dressed}, skip_special_tokens=False) = {kept!r}",
            hint=Hint(
                "the flag is not looked at: without the special tokens in the text nobody sees that the model ends "
                "at once",
                "tokenizer.flags_ignored",
            )
            if kept.split() == bare.split()
            else Hint("a cache is keyed without the flag", "tokenizer.cached_flags"),
        )


@register_check(
    "tokenizer.round_trip",
    holds="decode(encode(x)) is x, or x as the tokenizer's own normaliser states it, where no token is unknown",
    needs=("tok",),
    requires=(),
    profile="smoke",
)
def check_round_trip(subject: Specimen, ctx: Context) -> None:
    """Words, punctuation, capitals, spaces, several scripts. What a tokenizer states that it loses is noted.

    A byte-level tokenizer promises every text back exactly. Others may lose white space and, if they lower-case, the
    case; a letter that is no unknown token is lost by none.
    """
    encoder = encoder_of(subject, ctx)
    if not encoder.can_decode:
        ctx.not_applicable(f"{encoder.name} has no decode()")
    unknown, exact = encoder.special("unk"), _byte_level(subject.tokenizer)
    without = False if encoder.takes_add else None
    seen, texts = 0, (*TEXTS, _of_its_own_words(ctx, encoder))
    for text in texts:
        ids = ids_of(ctx, encoder, text, without)
        if unknown is not None and unknown in ids and not exact:
            kept = " ".join(word for word in text.split() if unknown not in encoder.encode(word, without))
            if not kept:
                continue
            text, ids = kept, ids_of(ctx, encoder, kept, without)
            if unknown in ids:
                continue
        seen += 1
        _check_text(ctx, encoder, text, ids, exact, without)
    if not seen:
        ctx.not_applicable("every text tried holds unknown tokens")
    if seen < len(texts):
        ctx.note(f"{len(texts) - seen} of {len(texts)} texts are unknown tokens only")
    _check_batch(subject, ctx, encoder)


def _of_its_own_words(ctx: Context, encoder: Encoder) -> str:
    """A text of words of the vocabulary, for one so small that it knows no other."""
    words = sorted(word for word in encoder.vocabulary() if word.isascii() and word.isalnum())
    ids = [encoder.vocabulary()[word] for word in words[:: max(1, len(words) // 40)]]
    return text_of(ctx, encoder, ids) if ids else TEXTS[0]


def _check_text(ctx: Context, encoder: Encoder, text: str, ids: list[int], exact: bool, without: bool | None) -> None:
    back = text_of(ctx, encoder, ids, True if encoder.takes_skip else None)
    where = f"{shortened(text)} comes back as {shortened(back)}"
    if back == text:
        return
    stated = _normalised(encoder.tokenizer, text)
    if back == stated:
        ctx.note("its normaliser changes the text (as stated)")
        return
    if _packed(back) == _packed(stated):
        cleans = getattr(encoder.tokenizer, "clean_up_tokenization_spaces", False)
        if exact and not cleans and back.lstrip(" ") != stated.lstrip(" "):
            ctx.fail(
                "a byte-level tokenizer does not give the white space back",
                where=where,
                hint=Hint(
                    "its decoder is not ByteLevel, or something strips or joins the pieces with spaces",
                    "tokenizer.decode_wrong",
                ),
            )
        ctx.note("white space does not survive" + (": clean_up_tokenization_spaces is on" if cleans else ""))
    elif _packed(back).casefold() == _packed(stated).casefold() and encoder.encode(text.lower(), without) == ids:
        ctx.note("it lower-cases")
    else:
        ctx.fail(
            f"decode(encode(x)) is not x: {_first_difference(_packed(stated), _packed(back))}",
            where=where,
            hint=Hint(
                "no token is unknown, so nothing may be lost: look for a table from id to token that is off by one or "
                "built from another vocabulary, a truncation, and pieces joined with the wrong separator",
                "tokenizer.decode_wrong",
            ),
        )
    again = ids_of(ctx, encoder, back, without)
    if again != ids:
        ctx.fail(
            "encode(decode(ids)) gives other ids, though no token is unknown",
            where=f"{where}; {_first_ids(ids, again)}",
            hint=Hint("decode joins the pieces so that encode takes them apart differently", "tokenizer.decode_wrong"),
        )


def _check_batch(subject: Specimen, ctx: Context, encoder: Encoder) -> None:
    """One at a time and as a batch; the wrapper and the library inside it; a slow class where there is one."""
    tokenizer = subject.tokenizer
    texts = list(TEXTS[:3])
    alone = [encoder.encode(text) for text in texts]
    if callable(tokenizer) and hasattr(tokenizer, "batch_decode"):
        together = tokenizer(texts)["input_ids"]
        if together != alone:
            ctx.fail("a batch of texts is encoded differently from each text alone", where=f"{together} and {alone}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        under = [backend.encode(text).ids for text in texts]
        if under != alone:
            ctx.fail(
                "the fast tokenizer and the `tokenizers` object inside it give different ids",
                where=f"{alone} and {under}",
                hint="the wrapper overrides encode(), or the settings of the two went apart",
            )
    slow = getattr(tokenizer, "slow_tokenizer_class", None)
    if slow is None or not getattr(tokenizer, "is_fast", False):
        return
    with tempfile.TemporaryDirectory(prefix="lmconform-") as folder:
        try:
            tokenizer.save_pretrained(folder)
            made = slow.from_pretrained(folder)
        except Exception as error:
            ctx.note(f"its slow sibling {slow.__name__} cannot be made from it: {first_line(error)}")
            return
    for text in TEXTS:
        fast, other = encoder.encode(text), list(made.encode(text))
        if fast != other:
            ctx.fail(
                f"fast and slow tokenizer differ: {_first_ids(fast, other)}",
                where=f"{shortened(text)}, {type(tokenizer).__name__} and {slow.__name__}",
                hint="the conversion lost a normaliser, a pre-tokenizer or an added token",
            )


# -- parts -----------------------------------------------------------------------------------------------------------


def encoder_of(subject: Specimen, ctx: Context) -> Encoder:
    encoder = Encoder(subject.tokenizer)
    if not encoder.can_encode:
        ctx.not_applicable(f"{encoder.name} has no encode()")
    return encoder


def text_of(ctx: Context, encoder: Encoder, ids: list[int], skip: bool | None = None) -> str:
    try:
        return encoder.decode(ids, skip)
    except EncodingError as error:
        ctx.fail(
            str(error),
            hint=Hint(
                "ids that encode() gives are unknown to decode(): the two tables do not agree",
                "tokenizer.decode_wrong",
                "tokenizer.ids_out_of_range",
            ),
        )
        raise AssertionError("unreachable") from error


def ids_of(ctx: Context, encoder: Encoder, text: str, add: bool | None) -> list[int]:
    try:
        return encoder.encode(text, add)
    except EncodingError as error:
        ctx.fail(str(error), hint="every text must be encodable: unknown characters become the unknown token or bytes")
        raise AssertionError("unreachable") from error


def _byte_level(tokenizer: Any) -> bool:
    """Whether the tokenizer states that it works on bytes, so that no text is lost."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"


def _normalised(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer's own normaliser states it."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    normalize = getattr(getattr(backend, "normalizer", None), "normalize_str", None)
    return str(normalize(text)) if callable(normalize) else text


def _packed(text: str) -> str:
    return "".join(text.replace("▁", " ").split())


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _named(encoder: Encoder, tokens: list[int]) -> str:
    roles = {token: role.upper() for role, token in reversed(encoder.specials().items())}
    return ", ".join(f"{roles.get(token, 'special')} {token}" for token in tokens)


def _first_difference(expected: str, actual: str) -> str:
    for place, (want, got) in enumerate(zip(expected, actual)):
        if want != got:
            return f"character {place} is {got!r}, expected {want!r}"
    missing = len(expected) - len(actual)
    return f"{missing} characters are missing at the end" if missing > 0 else f"{-missing} characters too many"


def _first_ids(first: list[int], second: list[int]) -> str:
    for place, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return f"token {place} is {one} and {other}"
    return f"{len(first)} and {len(second)} tokens"
