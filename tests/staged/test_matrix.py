"""Block order and matrix layout agree, and MU does with them what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.staged.matrix import BLOCK_NAMES, from_blocks, to_blocks
from models.staged.system import tiny
from models.staged.unit import MatrixUnit

# row r, column c holds 10 r + c
MATRIX = torch.tensor([[10 * row + column for column in range(8)] for row in range(8)])
BLOCK = {"I": [0, 1, 10, 11], "S": [2, 3, 12, 13], "C2": [6, 7, 16, 17], "R1": [20, 21, 30, 31], "X": [66, 67, 76, 77]}


@pytest.mark.parametrize("name", BLOCK)
def test_blocks_are_the_squares_of_the_matrix_row_by_row(name: str) -> None:
    blocks = to_blocks(MATRIX.flatten())
    assert blocks.shape == (16, 4)
    assert blocks[BLOCK_NAMES.index(name)].tolist() == BLOCK[name]


def test_sixteen_names_stand_in_their_order() -> None:
    assert tuple(["I", "S", "C1", "C2", "R1", "R2", "T", "K", "G", "M", "D", "F", "P", "E", "A", "X"]) == BLOCK_NAMES


def test_blocks_become_the_matrix_again() -> None:
    state = torch.randn(3, 5, 64)
    assert torch.equal(from_blocks(to_blocks(state)), state)


@pytest.fixture
def unit() -> MatrixUnit:
    torch.manual_seed(0)
    model: Any = tiny(0, full=True)
    made: MatrixUnit = model.model.blocks[0]
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


POSITIONS = torch.arange(6)[None]


def changed(before: Tensor, after: Tensor) -> list[str]:
    """The blocks at the last token [.., time, 64] that differ."""
    return [name for name, differs in zip(BLOCK_NAMES, (to_blocks(before - after)[0, -1] != 0).any(-1)) if differs]


@pytest.mark.parametrize("name", ["I", "R2", "X"])
@torch.no_grad()
def test_over_time_a_block_hears_only_itself(unit: MatrixUnit, name: str) -> None:
    blocks = torch.randn(1, 6, 16, 4)
    other = blocks.clone()
    other[0, 2, BLOCK_NAMES.index(name)] += 1
    one, two = (from_blocks(unit.within(some, POSITIONS, None, None)) for some in (blocks, other))
    assert changed(one, two) == [name]


@torch.no_grad()
def test_within_a_token_every_block_hears_the_others(unit: MatrixUnit) -> None:
    unit.across.qkv.weight.data *= 0.3  # no softmax so sharp that a block hears one other alone
    blocks = torch.randn(1, 6, 16, 4)
    other = blocks.clone()
    other[0, -1, 5] += 1
    assert changed(*(from_blocks(unit.across(some)) for some in (blocks, other))) == list(BLOCK_NAMES)
    elsewhere = blocks.clone()
    elsewhere[0, 0] += 1
    assert changed(*(from_blocks(unit.across(some)) for some in (blocks, elsewhere))) == []


@torch.no_grad()
def test_sensitivity_is_how_much_of_the_update_a_token_takes(unit: MatrixUnit) -> None:
    """M <- M + s (new - M): nothing at s = 0, all at s = 1, and linear in between."""
    state = torch.randn(2, 6, 64)

    def updated(logit: float) -> Tensor:
        unit.sensitivity.weight.zero_()
        unit.sensitivity.bias.fill_(logit)
        return unit(state, POSITIONS, None, None)

    new = updated(1e4)
    assert torch.equal(updated(-1e4), state)
    torch.testing.assert_close(updated(-1.0), state + torch.tensor(-1.0).sigmoid() * (new - state))


@torch.no_grad()
def test_sensitivity_is_each_tokens_own(unit: MatrixUnit) -> None:
    found = unit.sensitivity(unit.norm(torch.randn(2, 6, 64))).sigmoid()
    assert ((found > 0) & (found < 1)).all()
    assert found.flatten().unique().numel() == 12


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_attends_as_through_sdpa(implementation: str) -> None:
    """Flex attention refuses heads of four features: MU goes through SDPA there, behind the same mask."""
    model = tiny(3)
    ids, mask = torch.randint(4, 64, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-4)
