"""Exact match on the final answer: generate, find the answer, compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.training.answers import final_answer, is_match
from models.training.data import Example, opening_ids

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExactMatch:
    """`share` of `asked` questions whose generated text gives the right answer; `answered` gave any."""

    share: float
    correct: int
    answered: int
    asked: int
    samples: list[dict[str, str]]


def left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids and attention mask [batch, time] of 1 and 0, padded on the left, so that all go on at the right end."""
    import torch

    time = max(map(len, prompts))
    ids = torch.tensor([[pad] * (time - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (time - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int, **settings: Any
) -> list[str]:
    """What the model writes behind each prompt, EOS and all after it left out. `settings` go to `generate()`."""
    import torch

    encoded = [opening_ids(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    ids, mask = left_padded(encoded, tokenizer.pad_token_id)
    with torch.no_grad(), _generating(model):
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **settings,
        )  # fmt: skip
    return [_behind(tokenizer, prompt, row[ids.shape[1] :]) for prompt, row in zip(encoded, made.tolist(), strict=True)]


def _behind(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The text of the new tokens, with the space before it where the tokenizer leaves spaces to decoding."""
    before, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, [*prompt, *new], new)
    )
    return whole[len(before) :] if whole.startswith(before) else alone


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    context: int | None = None,
    quiet: bool = False,
    label: str = "exact match",
) -> ExactMatch | None:
    """Greedy answers to all examples that have one; None where none has.

    `context` is the model's number of positions: a question that leaves less room than `max_new_tokens` gets what
    there is.
    """
    from tqdm import tqdm

    asked = [example for example in examples if example.gold is not None]
    if not asked:
        return None
    asked.sort(key=lambda example: len(example.prompt))  # rows of a batch need about the same padding
    samples: list[dict[str, str]] = []
    correct = answered = 0
    for start in tqdm(range(0, len(asked), batch_size), desc=label, disable=quiet, leave=False):
        some = asked[start : start + batch_size]
        prompts = [example.prompt for example in some]
        room = max_new_tokens
        if context is not None:
            longest = max(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + 1 for prompt in prompts)
            room = max(1, min(room, context - longest))
        for example, text in zip(some, generate(model, tokenizer, prompts, max_new_tokens=room, do_sample=False)):
            assert example.gold is not None
            correct += is_match(text, example.gold)
            answered += final_answer(text) is not None
            samples.append({"prompt": example.prompt, "written": text, "answer": example.gold})
    return ExactMatch(correct / len(asked), correct, answered, len(asked), samples[:5])


@contextmanager
def _generating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and back to the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
