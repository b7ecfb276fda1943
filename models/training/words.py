"""Word and character tokenizers whose vocabulary is counted, as ordinary fast tokenizers of transformers.

PAD 0, UNK 1, BOS 2, EOS 3. Encoding puts BOS in front and nothing behind: a prompt that ended in EOS would ask for a
new text. A training text gets its EOS from whoever prepares it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from models.training.errors import UsageError
from models.training.tokenizing import SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

MARKS = ".!?',;:-"
LETTERS = r"\p{L}\p{M}\p{N}"
# a mark that closes stands at the word before it; an apostrophe and a hyphen join, where they stand in a word
JOINED = ((r" (?=[.!?,;:])", ""), (r"(?<=\w) ' (?=(?:s|t|m|d|ll|re|ve)\b)", "'"), (r"(?<=\w) - (?=\w)", "-"))


def normal_form(text: str) -> str:
    """What `word_level` keeps of a text by default: lower case, words and MARKS, spaces by rule."""
    normalizer, splitter, decoder = _word_pipeline(lowercase=True, marks=MARKS)
    pieces = splitter.pre_tokenize_str(normalizer.normalize_str(text))
    joined: str = decoder.decode([piece for piece, _ in pieces])
    return joined


def word_level(
    texts: Sequence[str], size: int, *, lowercase: bool = True, marks: str = MARKS
) -> PreTrainedTokenizerFast:
    """Words and `marks`, the `size - 4` most frequent of the texts (ties by the alphabet); other words are `<unk>`.

    The normaliser states what is lost: case, and every character that is neither a word's nor a mark. Spaces are put
    back by rule. `encode(decode(ids))` is `ids`. Raises UsageError where `size` leaves no room for a word, or the texts
    hold none.
    """
    normalizer, splitter, decoder = _word_pipeline(lowercase=lowercase, marks=marks)
    made = _counted(texts, size, "word", normalizer, splitter)
    made.decoder = decoder
    return _wrapped(made)


@cache
def _word_pipeline(*, lowercase: bool, marks: str) -> tuple[Any, Any, Any]:
    """Normaliser, pre-tokenizer and decoder of words and these marks."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    kept = re.escape(marks)
    steps = [
        normalizers.NFC(),
        normalizers.Replace(Regex("[‘’]"), "'"),
        normalizers.Replace(Regex(rf"[^{LETTERS}{kept}]+"), " "),
    ]
    piece = Regex(rf"[{LETTERS}]+" + (f"|[{kept}]" if kept else ""))
    return (
        normalizers.Sequence([*steps, normalizers.Lowercase(), normalizers.NFC()] if lowercase else steps),
        pre_tokenizers.Split(piece, behavior="removed", invert=True),
        decoders.Sequence(
            [
                decoders.WordPiece(prefix="##", cleanup=False),  # one space between tokens; none begins with ##
                decoders.Fuse(),
                *(decoders.Replace(Regex(pattern), content) for pattern, content in JOINED),
            ]
        ),
    )


def characters(texts: Sequence[str], size: int, *, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Single characters, the `size - 4` most frequent of the texts; lossless for those, others are `<unk>`.

    Raises UsageError as `word_level`.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    made = _counted(
        texts, size, "character",
        normalizers.Lowercase() if lowercase else normalizers.Sequence([]),
        pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated"),
    )  # fmt: skip
    made.decoder = decoders.Fuse()
    return _wrapped(made)


def _counted(texts: Sequence[str], size: int, kind: str, normalizer: Any, pieces: Any) -> Tokenizer:
    """A table of the specials and the most frequent pieces."""
    from tokenizers import Tokenizer, models, trainers

    if size <= len(SPECIAL):
        raise UsageError(f"--vocab-size {size} leaves no room for a {kind}: {len(SPECIAL)} ids are special tokens")
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizer, pieces
    made.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    )
    if made.get_vocab_size() == len(SPECIAL):
        raise UsageError(f"the training texts hold no {kind}: nothing to make a vocabulary of")
    return made


def _wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
