"""The twenty problems: a left-padded batch with a cache generates what each prompt generates alone without one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmconform
from fixtures.problems import CATEGORIES, PROBLEMS, math_tokenizer
from fixtures.subjects import positional

NEW = 8
COMBINATIONS = [
    pytest.param(base, variant, id=f"{base}_{variant}") for base in positional.BASES for variant in positional.VARIANTS
]


@functools.cache
def model(base: str, variant: str) -> PreTrainedModel:
    """Weights large enough that the text depends on the prompt and on the order in it."""
    torch.manual_seed(1)
    made = positional.build(base, variant).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    made.generation_config.eos_token_id = None
    return made


@functools.cache
def prompts() -> dict[str, Tensor]:
    made = math_tokenizer()([problem.question for problem in PROBLEMS], padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def new_tokens(base: str, variant: str, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    """The generated tokens alone: [batch, NEW]."""
    how = {"do_sample": False, **how}
    with torch.no_grad():
        return model(base, variant).generate(**inputs, max_new_tokens=NEW, pad_token_id=0, **how)[:, -NEW:]


@functools.cache
def batched(base: str, variant: str, **how: Any) -> Tensor:
    return new_tokens(base, variant, prompts(), **how)


def alone(index: int) -> dict[str, Tensor]:
    real = prompts()["attention_mask"][index].bool()
    return {name: values[index][real][None] for name, values in prompts().items()}


def some(count: int) -> dict[str, Tensor]:
    return {name: values[:count] for name, values in prompts().items()}


def test_problems_are_twenty_in_ten_categories() -> None:
    assert len(PROBLEMS) == 20
    assert len(CATEGORIES) == 10
    assert len({problem.question for problem in PROBLEMS}) == 20
    unknown = math_tokenizer().unk_token_id
    assert all(unknown not in math_tokenizer().encode(problem.question) for problem in PROBLEMS)


@pytest.mark.parametrize("problem", range(20), ids=[problem.id.replace(" ", "_") for problem in PROBLEMS])
@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_problem(base: str, variant: str, problem: int) -> None:
    expected = new_tokens(base, variant, alone(problem), use_cache=False)
    assert batched(base, variant)[problem].tolist() == expected[0].tolist()


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_text_depends_on_the_prompt(base: str, variant: str) -> None:
    assert len({tuple(row) for row in batched(base, variant).tolist()}) > 5


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_beams(base: str, variant: str) -> None:
    together = new_tokens(base, variant, some(3), num_beams=3)
    for index in range(3):
        expected = new_tokens(base, variant, alone(index), num_beams=3, use_cache=False)
        assert together[index].tolist() == expected[0].tolist()


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_sampling_is_the_same_cached_and_not(base: str, variant: str) -> None:
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        how = {"do_sample": True, "temperature": 0.8, "top_k": 20, "use_cache": use_cache}
        drawn.append(new_tokens(base, variant, some(4), **how))
    assert drawn[0].tolist() == drawn[1].tolist()
    assert drawn[0].tolist() != batched(base, variant)[:4].tolist()


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_static_cache(base: str, variant: str) -> None:
    static = new_tokens(base, variant, some(5), cache_implementation="static", disable_compile=True)
    assert static.tolist() == batched(base, variant)[:5].tolist()


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_prompt_as_embeddings(base: str, variant: str) -> None:
    inputs = some(5)
    embeds = model(base, variant).get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert new_tokens(base, variant, given).tolist() == batched(base, variant)[:5].tolist()


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_continues_after_right_padding(base: str, variant: str) -> None:
    """A batch padded on the right, cached, then one more token a row: what an unpadded row gives."""
    made, inputs = model(base, variant), some(4)
    lengths = inputs["attention_mask"].sum(1)
    longest = int(lengths.max())
    ids, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
    for row in range(4):
        ids[row, : lengths[row]] = alone(row)["input_ids"][0]
        mask[row, : lengths[row]] = 1
    more = torch.tensor([[40], [50], [60], [70]])
    with torch.no_grad():
        cache = made(ids, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat((mask, torch.ones(4, 1, dtype=torch.long)), 1)
        logits = made(more, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
        for row in range(4):
            expected = made(torch.cat((alone(row)["input_ids"], more[row : row + 1]), 1)).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_on_the_simulated_accelerator(base: str, variant: str) -> None:
    """Built on the CPU, moved, prompts moved: no tensor is left behind, and the text is the same."""
    inputs = some(2)
    with lmconform.simulated_accelerator(devices=1):
        torch.manual_seed(1)
        moved = positional.build(base, variant).eval()
        with torch.no_grad():
            for parameter in moved.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        moved.generation_config.eos_token_id = None
        moved.to("cuda")
        ids, mask = (inputs[name].to("cuda") for name in ("input_ids", "attention_mask"))
        made = moved.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert made.device.type == "cuda"
        made = made.cpu()
    assert made[:, -NEW:].tolist() == batched(base, variant)[:2].tolist()
