"""The staged decoder: MU, TEMPORAL, operators, graph routing. K-1 acts on gradients only (`credit.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from models.layers import Decoder, DecoderForCausalLM, RotaryEmbedding, Scores, score_mask
from models.layers.masks import seen_positions
from models.staged.config import StagedConfig
from models.staged.graph import meanings, routing_bias, with_cached
from models.staged.temporal import Projector, TokenTable
from models.staged.unit import MatrixUnit


class StagedModel(Decoder):
    """`models.layers.Decoder` behind a table of another width, MU where the model is full, and a projector.

    MU is the first of the blocks: `encode` runs it, in front of the projector, on the width of the token state. It and
    the meanings of tokens are cached as layers behind the operators' own.
    """

    config: StagedConfig
    config_class = StagedConfig
    _no_split_modules = ["DecoderBlock", "MatrixUnit"]  # noqa: RUF012

    def build(self, config: StagedConfig) -> None:  # type: ignore[override]
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: the table is embed_dim wide and the head hidden_size")
        self.embedding = TokenTable(config)
        if config.use_full_model:
            self.blocks.insert(0, MatrixUnit(config, layer=config.num_hidden_layers))
        self.projector = Projector(config)
        self.rotary = RotaryEmbedding(config)

    def stack(self) -> Iterable[nn.Module]:
        return itertools.islice(self.blocks, self.config.units, None)

    def set_input_embeddings(self, value: nn.Module) -> None:
        super().set_input_embeddings(value)
        if isinstance(value, TokenTable):
            value.fit_time()

    def encode(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Tensor:
        state = inputs_embeds[..., : self.config.embed_dim]
        time = inputs_embeds[..., self.config.embed_dim :]
        for unit in itertools.islice(self.blocks, self.config.units):
            state = unit(state, position_ids, attention_mask, past_key_values)
        return self.projector(state, time, position_ids)

    def scores(
        self,
        mask: Any,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Scores:
        if not self.config.routes:
            return super().scores(mask, inputs_embeds, position_ids, attention_mask, past_key_values)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        keys = seen_positions(mask, attention_mask, position_ids, past_key_values)
        unit = meanings(inputs_embeds[..., : self.config.embed_dim])
        layer = self.config.num_hidden_layers + self.config.units
        bias = routing_bias(position_ids, keys, unit, with_cached(unit, past_key_values, layer), self.config)
        return score_mask(self.config, mask, bias, past)


class StagedForCausalLM(DecoderForCausalLM):
    """The staged decoder with a language model head."""

    config: StagedConfig
    config_class = StagedConfig
    decoder_class = StagedModel
    _tied_weights_keys = {}  # noqa: RUF012  (the table and the head have different widths)
