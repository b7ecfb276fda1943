"""Excited weights: every part is felt, nothing leaves its range, same seed same weights."""

from __future__ import annotations

import pytest
import torch

from fixtures.subjects import SOUND, build
from lmconform.excitation import excite


@pytest.mark.parametrize("name", SOUND)
def test_moves_every_parameter_and_keeps_ties(name: str) -> None:
    module, fresh = build(name), build(name)
    shared = [p.data_ptr() for p in module.parameters()]
    excite(module, seed=0)
    moved = dict(module.named_parameters())
    assert [p.data_ptr() for p in module.parameters()] == shared
    assert all(not torch.equal(p, moved[key]) for key, p in fresh.named_parameters())
    assert all(bool(p.isfinite().all()) for p in moved.values())


@pytest.mark.parametrize("name", ["plain", "gpt2", "mixtral", "mamba"])
def test_same_seed_gives_the_same_weights(name: str) -> None:
    first, second, third = build(name), build(name), build(name)
    excite(first, seed=5)
    excite(second, seed=5)
    excite(third, seed=6)
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama"])
def test_attention_is_no_longer_uniform(name: str) -> None:
    module = build(name).eval()
    ids = torch.arange(3, 43)[None]
    before = module(ids).logits.std(dim=1).mean()
    excite(module, seed=0)
    assert module(ids).logits.std(dim=1).mean() > 5 * before
