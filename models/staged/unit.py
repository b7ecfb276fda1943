"""MU: the semantic matrix of each token, updated from the tokens before it and from block to block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from models.layers import ResidualProjection, RotaryEmbedding, SelfInitialised, keep_beside, turn
from models.layers.attention import attend
from models.layers.masks import causal_mask
from models.staged.config import StagedConfig
from models.staged.matrix import BLOCKS, FEATURES, SIZE, from_blocks, to_blocks
from models.staged.widths import WidthScaled, changed

WIDENING = 2  # of the feed-forward


class WithinBlocks(SelfInitialised):
    """Causal attention over time within each semantic block: sixteen heads of four features, weights of their own."""

    is_causal = True

    def __init__(self, config: StagedConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = nn.Parameter(torch.empty(BLOCKS, FEATURES, 3 * FEATURES))
        self.out = nn.Parameter(torch.empty(BLOCKS, FEATURES, FEATURES))
        self.rotary = RotaryEmbedding(changed(config, head_dim=FEATURES))

    def initialise(self, std: float) -> None:
        init.normal_(self.qkv, std=FEATURES**-0.5)
        init.normal_(self.out, std=std)

    def forward(
        self, blocks: Tensor, position_ids: Tensor, attention_mask: Any, past_key_values: Cache | None
    ) -> Tensor:
        """blocks [batch, time, 16, 4] -> the same; attention_mask as the model gets it, for this many keys."""
        qkv = torch.einsum("btnc,ncd->bntd", blocks, self.qkv)
        query, key, value = qkv.chunk(3, dim=-1)
        cos, sin = self.rotary(blocks, position_ids)
        query, key = turn(query, cos, sin), turn(key, cos, sin)
        # flex attention refuses heads this small
        implementation = "eager" if self.config._attn_implementation == "eager" else "sdpa"
        config = self.config
        if config._attn_implementation != implementation:
            config = changed(config, _attn_implementation=implementation)
        mask = causal_mask(config, blocks.flatten(-2), attention_mask, past_key_values, position_ids)
        if past_key_values is not None:
            key, value = keep_beside(past_key_values, key, value, self.layer)
        mixed, _ = attend(
            self, query, key, value, mask, implementation=implementation, scaling=FEATURES**-0.5, dropout=0.0
        )
        return torch.einsum("btnc,ncd->btnd", mixed, self.out)


class AcrossBlocks(SelfInitialised):
    """Attention from block to block within one token. What names the blocks is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Parameter(torch.empty(BLOCKS, FEATURES))
        self.qkv = WidthScaled(FEATURES, 3 * FEATURES, bias=False)
        self.out = ResidualProjection(FEATURES, FEATURES)

    def initialise(self, std: float) -> None:
        init.normal_(self.names, std=1.0)

    def forward(self, blocks: Tensor) -> Tensor:
        """[batch, time, 16, 4] -> the same."""
        query, key, value = self.qkv(blocks + self.names).chunk(3, dim=-1)
        weights = (query @ key.mT * FEATURES**-0.5).softmax(-1)
        return self.out(weights @ value)


class Sensitivity(nn.Linear, SelfInitialised):
    """How much of its update a token takes, as a logit. It starts at 12 %: untrained updates would drown the state."""

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.constant_(self.bias, -2.0)


class MatrixUnit(nn.Module):
    """M <- M + s (new - M): within blocks over time, across blocks, feed-forward; s in (0, 1), one for each token."""

    def __init__(self, config: StagedConfig, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE, eps=config.norm_eps)
        self.within = WithinBlocks(config, layer)
        self.across_norm = nn.LayerNorm(SIZE, eps=config.norm_eps)
        self.across = AcrossBlocks()
        self.feed_forward_norm = nn.LayerNorm(SIZE, eps=config.norm_eps)
        self.up = nn.Linear(SIZE, WIDENING * SIZE)
        self.down = ResidualProjection(WIDENING * SIZE, SIZE)
        self.sensitivity = Sensitivity(SIZE, 1)

    def forward(
        self, state: Tensor, position_ids: Tensor, attention_mask: Any, past_key_values: Cache | None
    ) -> Tensor:
        """state [batch, time, 64], an 8x8 matrix row by row, -> the same."""
        normed = self.norm(state)
        within = self.within(to_blocks(normed), position_ids, attention_mask, past_key_values)
        new = state + from_blocks(within)
        new = new + from_blocks(self.across(to_blocks(self.across_norm(new))))
        new = new + self.down(nn.functional.gelu(self.up(self.feed_forward_norm(new))))
        return state + self.sensitivity(normed).sigmoid() * (new - state)
