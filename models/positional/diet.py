"""DIET: position attention decoupled from the content."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from models.positional.encoding import PositionEncoding, at_distances


class DietRel(PositionEncoding):
    """score(i, j) + R[h, i - j]: a learned scalar per head and distance, shared by all layers.

    Chen et al. 2021 (arXiv 2104.08698), DIET-REL. Distances beyond `max_position_embeddings` - 1 share the last scalar.
    """

    biases = True
    relative = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.longest = config.max_position_embeddings
        self.scalar = nn.Embedding(self.longest, config.num_attention_heads)

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        return at_distances(self.scalar.weight.T, query, key).to(dtype)


class DietAbs(PositionEncoding):
    """score(i, j) + P_Q[h, i] . P_K[h, j]: two learned vectors of size `rank` per head and position, in all layers.

    Chen et al. 2021 (arXiv 2104.08698), DIET-ABS: a position-position term of low rank. Knows `max_position_embeddings`
    positions; more raise ValueError.
    """

    biases = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.longest = config.max_position_embeddings
        self.heads, self.rank = config.num_attention_heads, int(config.pe_options["rank"])
        if self.rank < 1:
            raise ValueError(f"diet: rank is a positive number, not {self.rank}")
        self.query = nn.Embedding(self.longest, self.heads * self.rank)
        self.key = nn.Embedding(self.longest, self.heads * self.rank)

    def initialise(self, std: float) -> None:
        """Position scores start with a standard deviation of sqrt(std): two factors of `std` each would be inert."""
        size = (std / self.rank) ** 0.25
        init.normal_(self.query.weight, std=size)
        init.normal_(self.key.weight, std=size)

    def check_length(self, length: int) -> None:
        if length > self.longest:
            raise ValueError(
                f"diet (abs) has a table of {self.longest} positions and is asked for {length}: shorten the input, "
                'raise max_position_embeddings, or use pe_options={"kind": "rel"}'
            )

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.query(query).unflatten(-1, (self.heads, self.rank)).transpose(1, 2)
        # padding may stand outside the table; what is read there is masked
        columns = self.key(key.clamp(0, self.longest - 1)).unflatten(-1, (self.heads, self.rank)).transpose(1, 2)
        return (rows @ columns.mT).to(dtype)


class Diet:
    """Chooses by `pe_options["kind"]`: "rel" (default) or "abs"."""

    OPTIONS: ClassVar[dict[str, Any]] = {"kind": "rel", "rank": 8}

    def __new__(cls, config: PreTrainedConfig) -> PositionEncoding:  # type: ignore[misc]
        kinds: dict[str, type[DietRel] | type[DietAbs]] = {"rel": DietRel, "abs": DietAbs}
        kind = config.pe_options["kind"]
        if kind not in kinds:
            raise ValueError(f'diet: kind is "rel" or "abs", not {kind!r}')
        return kinds[kind](config)
