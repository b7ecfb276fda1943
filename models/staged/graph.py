"""Graph routing: which earlier tokens a token attends to, and how much of the others.

An edge leads to the token itself and to the `graph_window` tokens before it; to tokens of like meaning (the cosine of
their semantic states, row by row); and, by shortcuts, to one in `graph_stretch` of all earlier tokens, drawn for each
position. All of it is a function of positions and of the tokens' own embeddings: the other rows of a batch, padding
and caching change nothing, and training and evaluation see one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache

from models.layers import keep_beside
from models.staged.config import StagedConfig

SOFTNESS = 0.2  # cosines from graph_similarity to this much above it open an edge by and by
NOTHING = 1e-6  # a share of its weight this small is none
WORD = 0xFFFFFFFF


def drawn(positions: Tensor, stretch: int, seed: int) -> Tensor:
    """For each position, one of 0 to stretch - 1 at random: a hash, the same on every machine and in every call.

    Three rounds of multiplication and shift over 32 bits (as in Murmur3's finaliser); int64 [...] -> int64 [...].
    """
    mixed = ((positions.long() + 1) * 0x9E3779B1 + (seed * 0x85EBCA77 & WORD)) & WORD
    for shift, factor in ((16, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & WORD
    return mixed % stretch


def fixed_edges(query: Tensor, key: Tensor, config: StagedConfig) -> Tensor:
    """Self, neighbours and shortcuts: boolean [batch or 1, query, key] for positions [batch or 1, query] and [.., key].

    A query's shortcuts lead to all keys of one residue class modulo the stretch, which the hash draws. So between any
    token and the query the next shortcut is at most stretch - 1 tokens away, and the other layers' windows bridge that.
    """
    near = query[:, :, None] - key[:, None, :] <= config.graph_window
    stretch = config.graph_stretch
    return near | (key[:, None, :] % stretch == drawn(query, stretch, config.graph_seed)[:, :, None])


def meanings(state: Tensor) -> Tensor:
    """Semantic states [batch, time, embed_dim] at length 1, in their own type."""
    exact = state.dtype if state.dtype == torch.float64 else torch.float32
    return nn.functional.normalize(state.to(exact), dim=-1).to(state.dtype)


def with_cached(unit: Tensor, past_key_values: Cache | None, layer: int) -> Tensor:
    """The meanings of all tokens so far [batch, key, embed_dim], from those of the new ones."""
    if past_key_values is None:
        return unit
    first, second = unit[:, None].tensor_split(2, dim=-1)
    return torch.cat(keep_beside(past_key_values, first, second, layer), dim=-1)[:, 0]


def routing_bias(query: Tensor, key: Tensor, unit: Tensor, units: Tensor, config: StagedConfig) -> Tensor:
    """log of the share of its weight that each key keeps, [batch, 1, query, key], to be added to the scores.

    query [batch or 1, query] and key [batch or 1, key] are positions, unit [batch, query, embed_dim] and units
    [batch, key, embed_dim] meanings. 0 for an edge, log(openness) for none, in between where the cosine stands within
    SOFTNESS of the bound: what the model computes is continuous in its weights.
    """
    exact = unit.dtype if unit.dtype == torch.float64 else torch.float32
    cosine = unit.to(exact) @ units.to(exact).mT
    share = ((cosine - config.graph_similarity) / SOFTNESS).clamp(config.graph_openness, 1)
    share = share.masked_fill(fixed_edges(query, key, config), 1)
    felt = share > NOTHING
    bias = torch.where(felt, share.where(felt, 1).log(), torch.finfo(unit.dtype).min / 2)
    return bias[:, None].to(unit.dtype)
