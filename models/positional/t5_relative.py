"""T5's bucketed relative position bias."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from models.layers import ExactBuffers
from models.positional.encoding import PositionEncoding, at_distances


def buckets(num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance 0 ... max_distance: [max_distance + 1].

    The first half of the buckets holds one distance each; the rest grow with the logarithm up to `max_distance`, beyond
    which all share the last.
    """
    distance = torch.arange(max_distance + 1)
    exact = num_buckets // 2
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return torch.where(distance < exact, distance, (exact + grown.long()).clamp(max=num_buckets - 1))


class T5Relative(ExactBuffers, PositionEncoding):
    """score(i, j) + b[h, bucket(i - j)], a learned scalar per head and bucket, unidirectional, shared by all layers.

    Raffel et al. 2020 (arXiv 1910.10683), section 2.1: 32 buckets, distances from 128 on share one.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"num_buckets": 32, "max_distance": 128}
    biases = True
    relative = True
    buckets: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_buckets = int(config.pe_options["num_buckets"])
        self.max_distance = int(config.pe_options["max_distance"])
        if not 2 <= self.num_buckets < 2 * self.max_distance:
            raise ValueError(
                f"t5_relative: {self.num_buckets} buckets do not fit a max_distance of {self.max_distance}: "
                "half of the buckets hold one distance each, so num_buckets must lie in 2 ... 2 * max_distance - 1"
            )
        self.weight = nn.Embedding(self.num_buckets, config.num_attention_heads)
        self.register_buffer("buckets", buckets(self.num_buckets, self.max_distance), persistent=False)

    def initialise(self, std: float) -> None:
        init.copy_(self.buckets, buckets(self.num_buckets, self.max_distance))

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        by_distance = self.weight.weight.T.index_select(1, self.buckets)  # [heads, max_distance + 1]
        return at_distances(by_distance, query, key).to(dtype)
