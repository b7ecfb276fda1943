"""What users hand over in other forms than transformers' own: shifted pairs, plain tokenizers, wrapped forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.recipes import texts
from fixtures.subjects import build
from fixtures.subjects.generating import GeneratingGPT
from fixtures.tokenizers import BOS, EOS, PAD, WordTokenizer
from lmconform import Recipe, Subject
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

Rows = list[list[int]]


def verdict(check: str, subject: Subject) -> Result:
    return Runner(subject.open(), shrink=False).run(get_check(check))


# -- inputs and targets shifted by the data ----------------------------------------------------------------------------


def rows_of(some: Sequence[str]) -> Rows:
    encoder = WordTokenizer()
    return [[BOS, *encoder.encode(text, add_special_tokens=False), EOS] for text in some]


def filled(rows: Rows, value: int) -> Tensor:
    time = max(map(len, rows))
    return torch.tensor([row + [value] * (time - len(row)) for row in rows])


def shifted_then_padded(rows: Rows, pad: int, target: int) -> dict[str, Tensor]:
    """x = [BOS, words], y = [words, EOS]; the last real input answers with the end, and padding follows in x alone."""
    mask = filled([[1] * (len(row) - 1) for row in rows], 0)
    inputs, labels = filled([row[:-1] for row in rows], pad), filled([row[1:] for row in rows], target)
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def without_mask(rows: Rows, pad: int, target: int) -> dict[str, Tensor]:
    made = shifted_then_padded(rows, pad, target)
    del made["attention_mask"]
    return made


def recipe(collate: Callable[..., dict[str, Tensor]], pad: int, target: int) -> Recipe:
    tokenizer = WordTokenizer()
    tokenizer.pad_token_id = pad
    return Recipe(
        texts=texts(32), validation=texts(8, 100), batch_size=8, tokenizer=tokenizer,
        collate=lambda some: collate(rows_of(some), pad, target),
        loss=lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        encode_prompt=lambda text: [BOS, *WordTokenizer().encode(text, add_special_tokens=False)],
    )  # fmt: skip


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["own_pad", "pad_is_eos"])
def test_final_end_of_shifted_pairs_is_no_padding(pad: int) -> None:
    subject = Subject(lambda: build("plain"), recipe=recipe(shifted_then_padded, pad, -100))
    result = verdict("collapse.labels", subject)
    assert result.status == "passed", result.message


def test_final_end_of_shifted_pairs_without_a_mask() -> None:
    subject = Subject(lambda: build("plain"), recipe=recipe(without_mask, PAD, -100))
    result = verdict("collapse.labels", subject)
    assert result.status == "passed", result.message


@pytest.mark.parametrize("collate", [shifted_then_padded, without_mask])
@pytest.mark.parametrize(("pad", "target"), [(PAD, PAD), (PAD, EOS), (EOS, EOS)])
def test_padding_of_shifted_pairs_that_counts_is_seen(
    collate: Callable[..., dict[str, Tensor]], pad: int, target: int
) -> None:
    result = verdict("collapse.labels", Subject(lambda: build("plain"), recipe=recipe(collate, pad, target)))
    assert "padding counts as a label" in result.message, result.message


# -- tokenizers with encode() alone ------------------------------------------------------------------------------------


def test_tokenizer_that_cannot_be_called_gives_the_prompt() -> None:
    seen: list[Tensor] = []

    class Watched(GeneratingGPT):
        def generate(self, idx: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(idx)
            return super().generate(idx, *args, **kwargs)

        generate.__signature__ = inspect.signature(GeneratingGPT.generate)  # type: ignore[attr-defined]

    def made() -> nn.Module:
        model = build("plain")
        model.__class__ = Watched
        return model

    tokenizer = WordTokenizer()
    assert not callable(tokenizer)
    result = verdict("generation.non_empty", Subject(made, tokenizer=tokenizer))
    assert result.status == "passed", result.message
    assert seen[0][0].tolist() == tokenizer.encode("Once upon a time there was a little")


# -- a forward() that hides attention_mask -----------------------------------------------------------------------------


def hidden(model: Any) -> Any:
    """The mask changes little: with weights near 0 the most likely token stays, the logits do not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj" in name or "c_attn" in name:
                parameter.mul_(1e-2)
    base = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    model.__class__ = type(base.__name__, (base,), {"forward": forward})
    return model


@pytest.mark.parametrize("host", ["llama", "gpt2", "gpt_neox"])
def test_hidden_mask_is_seen_by_the_logits(host: str) -> None:
    result = verdict("generation.no_mask", Subject(lambda: hidden(build(host)), name=host))
    assert result.status == "failed"
    assert "logits without attention_mask" in result.message or "tokens without attention_mask" in result.message
    assert result.suspects == ("generation.mask_hidden",)
