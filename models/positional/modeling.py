"""The own decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from models.layers import Decoder, DecoderForCausalLM
from models.positional.config import PositionalConfig
from models.positional.encoding import PositionEncoding
from models.positional.math_adaptive import MathAdaptive
from models.positional.methods import make_encoding


class ReadsTokens(ABC):
    """What token tables need of their model: a tokenizer once, and to stay as long as the vocabulary."""

    @abstractmethod
    def position_encoding(self) -> PositionEncoding:
        """The one encoding that every layer shares."""

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Build math_adaptive's per-token tables, saved with the model; the other methods need none."""
        encoding = self.position_encoding()
        if isinstance(encoding, MathAdaptive):
            encoding.read(tokenizer)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; math_adaptive's tables keep up."""
        resized = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        encoding = self.position_encoding()
        if isinstance(encoding, MathAdaptive):
            encoding.resize(resized.num_embeddings)
        return resized


class PositionalModel(Decoder):
    """`models.layers.Decoder` whose three seams lead to one position encoding."""

    config: PositionalConfig
    config_class = PositionalConfig
    encoding: PositionEncoding

    def build(self, config: PositionalConfig) -> None:  # type: ignore[override]
        self.encoding = make_encoding(config)

    @property
    def has_score_bias(self) -> bool:
        return self.encoding.biases

    def encode(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Tensor:
        return self.encoding.add(
            inputs_embeds, input_ids, position_ids, attention_mask, past_key_values, self.embedding
        )

    def rotation(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.encoding(hidden_states, position_ids)

    def score_bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor | None:
        self.encoding.check_length(key.shape[1])
        return self.encoding.bias(query, key, dtype)


class PositionalForCausalLM(ReadsTokens, DecoderForCausalLM):
    """The own decoder with a language model head."""

    config: PositionalConfig
    config_class = PositionalConfig
    decoder_class = PositionalModel

    def position_encoding(self) -> PositionEncoding:
        assert isinstance(self.model, PositionalModel)
        return self.model.encoding
