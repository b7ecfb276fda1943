"""One way of calling any tokenizer: transformers', the tokenizers library's, or a class of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lmconform.conventions import first_line

ADD = "add_special_tokens"
SKIP = "skip_special_tokens"
ROLES = ("bos", "eos", "pad", "unk")


class EncodingError(Exception):
    """The tokenizer has no way of encoding or decoding that is known here, or raised; the text says which."""


class Encoder:
    """encode(text) -> ids and decode(ids) -> text, with the flags where the tokenizer takes them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = type(tokenizer).__name__
        self._encode = getattr(tokenizer, "encode", None) or (tokenizer if callable(tokenizer) else None)
        self._decode = getattr(tokenizer, "decode", None)
        self.takes_add = _takes(self._encode, ADD)
        self.takes_skip = _takes(self._decode, SKIP)

    @property
    def can_encode(self) -> bool:
        return callable(self._encode)

    @property
    def can_decode(self) -> bool:
        return callable(self._decode)

    def raw(self, text: str, add: bool | None = None) -> Any:
        """What encode() itself returns. `add`: add_special_tokens, None for the tokenizer's default."""
        if self._encode is None:
            raise EncodingError(f"{self.name} has no encode()")
        try:
            return self._encode(text) if add is None else self._encode(text, **{ADD: add})
        except Exception as error:
            raise EncodingError(f"encoding {text!r} raised {type(error).__name__}: {first_line(error)}") from error

    def encode(self, text: str, add: bool | None = None) -> list[int]:
        return as_ids(self.raw(text, add))

    def decode(self, ids: Sequence[int], skip: bool | None = None) -> str:
        """`skip`: skip_special_tokens, None for the tokenizer's default."""
        if self._decode is None:
            raise EncodingError(f"{self.name} has no decode()")
        try:
            made = self._decode(list(ids)) if skip is None else self._decode(list(ids), **{SKIP: skip})
        except Exception as error:
            raise EncodingError(f"decoding {list(ids)} raised {type(error).__name__}: {first_line(error)}") from error
        return str(made)

    def special(self, role: str) -> int | None:
        """The id of bos, eos, pad or unk; None where it has none."""
        for name in (f"{role}_token_id", f"{role}_id", f"{role}_idx"):
            value = getattr(self.tokenizer, name, None)
            value = value() if callable(value) else value
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        vocabulary = self.vocabulary()
        for name in SPELLINGS[role]:
            if name in vocabulary:
                return vocabulary[name]
        return None

    def specials(self) -> dict[str, int]:
        """Ids by role, and every other token that the tokenizer itself calls special."""
        found = {role: token for role in ROLES if (token := self.special(role)) is not None}
        listed = getattr(self.tokenizer, "all_special_ids", None)
        for token in listed if isinstance(listed, list | tuple | set) else ():
            if token not in found.values():
                found[f"special {token}"] = token
        return found

    def vocabulary(self) -> dict[str, int]:
        """Token strings and ids, as far as the tokenizer tells."""
        for name in ("get_vocab", "vocab", "token_to_id", "stoi", "word2idx", "word_to_id"):
            value = getattr(self.tokenizer, name, None)
            if callable(value):
                try:
                    value = value()
                except TypeError:  # token_to_id(token) of another library
                    continue
            if isinstance(value, dict) and all(isinstance(token, int) for token in value.values()):
                return {str(key): token for key, token in value.items()}
        return {}


SPELLINGS = {
    "bos": ("<s>", "<bos>", "[BOS]", "<BOS>", "<|bos|>", "<|startoftext|>", "<sos>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<EOS>", "<|eos|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<PAD>", "<|pad|>"),
    "unk": ("<unk>", "[UNK]", "<UNK>", "<|unk|>"),
}


def as_ids(made: Any) -> list[int]:
    """A flat list of ids from a list, a tensor, an array, an Encoding or a BatchEncoding. Raises EncodingError."""
    if hasattr(made, "keys") and "input_ids" in made:
        made = made["input_ids"]
    made = getattr(made, "ids", made)
    if hasattr(made, "tolist"):
        made = made.tolist()
    made = list(made)
    if len(made) == 1 and isinstance(made[0], list | tuple):
        made = list(made[0])
    if not all(isinstance(token, int) for token in made):
        raise EncodingError(f"encode() gave {type(made[0]).__name__} where ids are expected: {made[:3]}")
    return [int(token) for token in made]


def _takes(function: Any, keyword: str) -> bool:
    if not callable(function):
        return False
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C: it has no signature to read, so it is tried
        try:
            function([] if keyword == SKIP else "", **{keyword: True})
        except Exception:
            return False
        return True
    return keyword in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
