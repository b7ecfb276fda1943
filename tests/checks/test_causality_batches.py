"""causality.no_future_leak sees the same where a large vocabulary makes it look at a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fixtures.subjects import build
from lmconform import check_model
from lmconform.checks import causality


@pytest.mark.parametrize("at_once", [1, 700, 5000, 1 << 25])
def test_batches_of_rows_give_what_one_batch_gives(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """9 rows of 4 positions and 50 tokens; each batch holds the last row, and no more than was allowed beside it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, 50, generator=generator)
    logits[2, 3, 7], logits[8, 3, 7] = -torch.inf, -torch.inf  # equal infinities do not differ
    compared = torch.rand(9, 4, generator=generator) < 0.7
    asked: list[list[int]] = []

    def call(chosen: list[int]) -> Tensor:
        asked.append(chosen)
        return logits[chosen]

    monkeypatch.setattr(causality, "AT_ONCE", at_once)
    monkeypatch.setattr(causality, "COMPARED_AT_ONCE", at_once)
    found, last = causality.changes(call, compared, 50)
    difference = (logits.double() - logits[-1:].double()).abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)
    assert torch.equal(found, torch.where(compared, difference, 0.0))
    assert torch.equal(last, logits[-1])
    assert sorted({row for chosen in asked for row in chosen}) == list(range(9))
    assert all(chosen[-1] == 8 and (len(chosen) - 1) * 4 * 50 <= max(at_once, 200) for chosen in asked)


@pytest.mark.parametrize("leaks", [False, True])
def test_the_verdict_is_the_same(monkeypatch: pytest.MonkeyPatch, leaks: bool) -> None:
    model = build("plain")
    if leaks:
        attention = model.blocks[1].attention
        attention.visible = lambda query, key, mask, device: torch.ones(query, key, dtype=torch.bool)[None, None]
    found = []
    for at_once in (1 << 25, 20_000):
        monkeypatch.setattr(causality, "AT_ONCE", at_once)
        found.append(check_model(model, select=["causality.no_future_leak"]).results[-1])
    assert [result.status for result in found] == ["failed" if leaks else "passed"] * 2
    assert found[0].where == found[1].where
    assert found[0].measured == pytest.approx(found[1].measured, rel=1e-3)
