"""What each token of a tokenizer means to mathematics, from its decoded string: built once per tokenizer."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRECEDENCE = (("=",), ("<", ">", "≤", "≥", "≠"), ("+", "-", "−", "±"), ("*", "/", "×", "·", "÷", "%"), ("^", "**"))
"""Operators from the weakest (level 1) to the strongest (level 5); 0 stands for no operator."""

LEVELS = len(PRECEDENCE) + 1

CLASSES = ("other", "space", "digit", "letter", "word", "operator", "open", "close", "punctuation", "special")

_OPEN, _CLOSE = "([{", ")]}"
_LEVEL = {sign: level for level, signs in enumerate(PRECEDENCE, 1) for sign in signs}


class TokenTables(NamedTuple):
    """The rows of the tables, int64 each: brackets opened, brackets closed, operator precedence, index into CLASSES."""

    opens: Tensor
    closes: Tensor
    precedence: Tensor
    kind: Tensor


def token_tables(tokenizer: Any, vocab_size: int) -> Tensor:
    """The rows of TokenTables [4, vocab] of a transformers tokenizer; ids beyond its vocabulary are "other"."""
    count = min(len(tokenizer), vocab_size)
    strings = tokenizer.batch_decode([[token] for token in range(count)], skip_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    rows = torch.zeros(4, vocab_size, dtype=torch.long)
    rows[:, :count] = torch.tensor(
        [
            [sum(sign in _OPEN for sign in text) * (token not in special) for token, text in enumerate(strings)],
            [sum(sign in _CLOSE for sign in text) * (token not in special) for token, text in enumerate(strings)],
            [0 if token in special else precedence(text) for token, text in enumerate(strings)],
            [CLASSES.index("special" if token in special else kind(text)) for token, text in enumerate(strings)],
        ]
    )
    return rows


def neutral_tables(vocab_size: int) -> Tensor:
    """[4, vocab] in which every token is "other": no bracket, no operator."""
    return torch.zeros(4, vocab_size, dtype=torch.long)


def precedence(text: str) -> int:
    """The level of the strongest operator in the token's string, 0 without one."""
    if "**" in text:
        return _LEVEL["**"]
    return max((_LEVEL.get(sign, 0) for sign in text), default=0)


def kind(text: str) -> str:
    """The class of a token's string, surrounding blanks aside."""
    bare = text.strip()
    if not bare:
        return "space" if text else "other"
    if bare[0] in _OPEN:
        return "open"
    if bare[0] in _CLOSE:
        return "close"
    if precedence(bare):
        return "operator"
    if bare.isdigit() or re.fullmatch(r"\d+[.,]\d+", bare):
        return "digit"
    if bare.isalpha():
        return "letter" if len(bare) == 1 else "word"
    return "punctuation" if not any(sign.isalnum() for sign in bare) else "other"
