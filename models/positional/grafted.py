"""What the grafted bases share: the encoding's three roles around a base whose own encoding is gone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from models.layers import attention, turn
from models.layers.initialisation import SelfInitialised
from models.layers.masks import causal_mask, score_mask, seen_positions
from models.layers.positions import default_positions
from models.positional.encoding import PositionEncoding
from models.positional.modeling import ReadsTokens


class NoTable(nn.Module):
    """Stands where the base had its position table: adds nothing, holds no parameter, has no longest length."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


class NoRotation(nn.Module):
    """Stands where the base had its rotary embedding: q and k are left as they are."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> None:
        return None


class GraftedAttention(nn.Module, ABC):
    """A base's attention that turns q and k only where it is told to.

    Subclasses come before the base's own class and say how it projects (`project`) and closes (`close`).
    """

    config: Any
    layer_idx: int
    scaling: float

    @abstractmethod
    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, heads or key heads, time, head_dim] of [batch, time, hidden_size]."""

    @abstractmethod
    def close(self, mixed: Tensor) -> Tensor:
        """The output projection of [batch, time, heads * head_dim]."""

    @abstractmethod
    def dropout_rate(self) -> float:
        """Of the attention weights, 0 outside training."""

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.project(hidden_states)
        if position_embeddings is not None:
            query, key = turn(query, *position_embeddings), turn(key, *position_embeddings)
        cache = past_key_values if layer_past is None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = attention.attend(
            self, query, key, value, attention_mask,
            implementation=self.config._attn_implementation or "eager", scaling=self.scaling,
            dropout=self.dropout_rate(), **kwargs,
        )  # fmt: skip
        return self.close(mixed.flatten(2)), weights


class MaskByPlace:
    """Mixin before a base's layer: the mask may hold a learned bias, and reentrant checkpointing follows no keyword."""

    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return super().__call__(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]


class InitialisesEncoding(PreTrainedModel):
    """Mixin before a base's classes: encodings fill themselves, everything else starts as in the base."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SelfInitialised):
            module.initialise(self.config.initializer_range)
        else:
            super()._init_weights(module)


class Grafted(ReadsTokens, InitialisesEncoding):
    """Mixin before a base's ...ForCausalLM: its forward, given what the encoding makes of the inputs."""

    encoding: PositionEncoding

    def position_encoding(self) -> PositionEncoding:
        return self.encoding

    def install(self, encoding: PositionEncoding) -> None:
        """Make `encoding` this model's own."""
        self.encoding = encoding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the base's, positions counted from the mask where none are given."""
        prepared = self.prepare(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        return super().forward(labels=labels, logits_to_keep=logits_to_keep, **prepared, **kwargs)

    def prepare(
        self,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
    ) -> dict[str, Any]:
        """What the base's forward is to get instead: embeddings, positions, mask, cache (and a bias beside the mask).

        Raises ValueError for both or neither kind of input and for an empty sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedding = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = embedding(input_ids)
        batch, time, _ = inputs_embeds.shape
        if time == 0:
            raise ValueError("the sequence is empty: give at least one token")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.base_model.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = position_ids
        if position_ids is None:
            position_ids = default_positions(attention_mask, batch, time, past, inputs_embeds.device)
        prepared = {
            "inputs_embeds": self.encoding.add(
                inputs_embeds, input_ids, position_ids, attention_mask, past_key_values, embedding
            ),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        if self.encoding.biases:
            mask = causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, given)
            keys = seen_positions(mask, attention_mask, position_ids, past_key_values)
            self.encoding.check_length(keys.shape[1])
            bias = self.encoding.bias(position_ids, keys, inputs_embeds.dtype)
            scores = score_mask(self.config, mask, bias, past)
            prepared["attention_mask"] = scores.mask
            if scores.bias is not None:
                prepared["position_bias"] = scores.bias
        return prepared
