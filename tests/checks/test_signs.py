"""scale.signs asks what the blocks do, not how embeddings are drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fixtures.subjects.plain import PlainGPT, plain
from lmconform import check_model


def one_sided_embeddings() -> PlainGPT:
    """Embeddings from 0 to 1, and branches that add little: every state is positive, and nothing forces it."""
    model = plain()
    nn.init.uniform_(model.embedding.weight)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter *= 0.02
    return model


def modulus_behind_each_block() -> PlainGPT:
    """The same embeddings, and blocks that do force it."""
    model = one_sided_embeddings()
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, given, out: (out[0].abs(), *out[1:]) if isinstance(out, tuple) else out.abs()
        )
    return model


@pytest.mark.parametrize("seed", range(3))
def test_embeddings_of_one_sign_are_sound(seed: int) -> None:
    report = check_model(one_sided_embeddings, select=["scale.signs"], seed=seed)
    assert report.ok, report.failed


def test_blocks_that_force_a_sign_are_seen_behind_such_embeddings() -> None:
    report = check_model(modulus_behind_each_block, select=["scale.signs"])
    assert [result.id for result in report.failed] == ["scale.signs"]
    assert "one-sided after blocks.0" in report.failed[0].message
