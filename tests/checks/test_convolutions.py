"""positions: a short convolution is no cut where other blocks reach everything, and is one where none does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.subjects.styles.parts import VOCAB, heads_apart, heads_together, may_look
from lmconform import Subject
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

WIDTH, HEADS, KERNEL = 48, 4, 3


class Convolution(nn.Module):
    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.norm(x).transpose(1, 2), (KERNEL - 1, 0))
        return x + self.conv(padded).transpose(1, 2)


class Attention(nn.Module):
    """A bias that falls with distance says where. `window`: what it is cut to; 0 for all."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_apart(part, HEADS) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        time = x.shape[1]
        may = may_look(time, 0, x.device).triu(1 - (self.window or time))
        places = torch.arange(time, device=x.device)
        bias = (-0.1 * (places[:, None] - places)).masked_fill(~may, float("-inf"))
        return x + self.out(heads_together(F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))))


class HeadsInBatch(Attention):
    """A window of keys is cut out for each query, with the heads folded into the batch: no [time, time] anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_apart(part, HEADS).flatten(0, 1) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        k, v = (F.pad(part, (0, 0, KERNEL, 0)).unfold(1, KERNEL + 1, 1) for part in (k, v))
        weights = torch.einsum("btd,btdw->btw", q, k).softmax(-1)
        mixed = torch.einsum("btw,btdw->btd", weights, v).unflatten(0, (-1, HEADS))
        return x + self.out(heads_together(mixed))


class Hybrid(nn.Module):
    def __init__(self, *kinds: type[nn.Module], window: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(kind(window) for kind in kinds)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def verdict(check: str, *kinds: type[nn.Module], window: int = 0) -> Result:
    return Runner(Subject(lambda: Hybrid(*kinds, window=window)).open(), shrink=False).run(get_check(check))


@pytest.mark.parametrize("check", ["positions.reach", "positions.distinct", "positions.order_matters"])
@pytest.mark.parametrize("kinds", [(Convolution, Attention), (Attention, Convolution, Convolution)])
def test_a_hybrid_that_states_no_kinds_conforms(check: str, kinds: tuple[type[nn.Module], ...]) -> None:
    assert verdict(check, *kinds).status == "passed"


def test_convolutions_alone_reach_no_further() -> None:
    result = verdict("positions.reach", Convolution, Convolution)
    assert result.status == "failed"
    assert "position 3 feels 3 of the 4 tokens" in result.message
    assert "block 1 has no attention and reaches 3 tokens from everywhere" in result.message
    assert verdict("positions.distinct", Convolution, Convolution).status == "passed"


def test_attention_that_is_cut_is_no_convolution() -> None:
    result = verdict("positions.reach", Convolution, Attention, window=8)
    assert result.status == "failed"
    assert "position 8 feels 8 of the 9 tokens" in result.message


def test_attention_within_a_window_is_no_convolution_however_it_is_written() -> None:
    result = verdict("positions.reach", HeadsInBatch, Attention)
    assert result.status == "failed"
    assert "feels 4 of the 5 tokens" in result.message
