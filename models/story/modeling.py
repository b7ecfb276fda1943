"""A decoder with the position vectors of Vaswani et al. 2017, trained on short stories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from models.layers import Decoder, DecoderForCausalLM, sinusoids
from models.story.config import StoryConfig


class StoryModel(Decoder):
    """E[token] sqrt(d) + PE(position), dropout, blocks (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    config_class = StoryConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):  # of unit variance once multiplied by sqrt(d), as PE is of 1/2
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)

    def encode(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Tensor:
        size = self.config.hidden_size
        return inputs_embeds * size**0.5 + sinusoids(position_ids, size).to(inputs_embeds.dtype)


class StoryForCausalLM(DecoderForCausalLM):
    """The story model and its untied head."""

    config_class = StoryConfig
    decoder_class = StoryModel
