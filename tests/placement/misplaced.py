"""Modules with one misplaced tensor each, as people write them, and a sound one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, TIME, VOCAB = 8, 6, 11
TABLE = torch.linspace(0, 1, 64 * WIDTH).view(64, WIDTH)


class Sound(nn.Module):
    """Embedding, one mixing layer with causal mask and position table, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.mix = Mix()
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(ids)))


class Mix(nn.Module):
    """scores, mask, softmax; each seam is overridden below."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", TABLE.clone())

    def positioned(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]

    def mask(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        return torch.ones(time, time, dtype=torch.bool, device=x.device).tril()

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.positioned(x))
        scores = (x @ x.transpose(1, 2)).masked_fill(~self.mask(x), -1e4)
        return scores.softmax(-1) @ x


class UnregisteredTable(Mix):
    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.table = TABLE.clone()


class DerivedFromUnregistered(UnregisteredTable):
    def positioned(self, x: Tensor) -> Tensor:
        return x + (self.table * 2.0).cos()[: x.shape[1]]


class TableInList(Mix):
    def __init__(self) -> None:
        super().__init__()
        self.tables = {"positions": [torch.zeros(1), TABLE.clone()]}

    def positioned(self, x: Tensor) -> Tensor:
        return x + self.tables["positions"][1][: x.shape[1]]


class GlobalTable(Mix):
    def positioned(self, x: Tensor) -> Tensor:
        return x + TABLE[: x.shape[1]]


class MaskOnDefaultDevice(Mix):
    def mask(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


class ArangeWithoutDevice(Mix):
    def positioned(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        return x + steps[:, None]


class BufferReplaced(Mix):
    def positioned(self, x: Tensor) -> Tensor:
        self.table = torch.full((x.shape[1], WIDTH), 0.5)
        return x + self.table


class LateParameter(Mix):
    def positioned(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(WIDTH))
        return x + self.late


class HardCoded(Mix):
    def mask(self, x: Tensor) -> Tensor:
        return super().mask(x).cuda()


class HardCodedFactory(Mix):
    def positioned(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1], device="cuda")[:, None]


def with_mix(mix: type[Mix]) -> Sound:
    torch.manual_seed(0)
    model = Sound()
    model.mix = mix()
    return model


def ids(device: str = "cpu") -> Tensor:
    return torch.arange(2 * TIME, device=device).view(2, TIME) % VOCAB
