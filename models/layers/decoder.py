"""A decoder and its language model head, with the seams at which the reference models differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from models.layers.attention import SelfAttention
from models.layers.block import DecoderBlock
from models.layers.config import DecoderConfig
from models.layers.initialisation import initialise
from models.layers.masks import Scores, causal_mask, score_mask, seen_positions
from models.layers.norms import norm
from models.layers.positions import default_positions


class DecoderPreTrainedModel(PreTrainedModel):
    """What transformers needs to know: initialisation, checkpointing, attention functions, output capturing."""

    config: DecoderConfig
    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012  (transformers' own declaration)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderBlock, "attentions": SelfAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config.initializer_range, self.config.num_hidden_layers)


class Decoder(DecoderPreTrainedModel):
    """Token embedding, blocks, final norm (pre-norm only).

    Seams for subclasses: `build` (own modules), `make_block`, `stack` (the blocks that are run), `encode` (adds to the
    embeddings), `rotary` (a module that gives cos and sin, or None; `rotation` calls it), `score_bias` (adds to the
    scores by position) and `scores` (does to them whatever else).
    """

    rotary: nn.Module | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(self.make_block(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.rotary = None
        self.build(config)
        self.post_init()

    def build(self, config: DecoderConfig) -> None:
        """A subclass's own modules, made before weights are initialised."""

    def make_block(self, config: DecoderConfig, index: int) -> nn.Module:
        return DecoderBlock(config, index)

    def stack(self) -> Iterable[nn.Module]:
        """The blocks that run behind `encode`, in order."""
        return self.blocks

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = cast(nn.Embedding, value)

    def encode(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Tensor:
        """What enters the first block: [batch, time, hidden_size]; position_ids [batch or 1, time]."""
        return inputs_embeds

    def score_bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[batch or 1, heads, query, key] added to the scores, for positions query [batch or 1, time] and key."""
        return None

    def rotation(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [batch or 1, time, d_rot] that turn q and k, None where nothing turns them."""
        return None if self.rotary is None else self.rotary(hidden_states, position_ids)

    @property
    def has_score_bias(self) -> bool:
        return type(self).score_bias is not Decoder.score_bias

    def scores(
        self,
        mask: Any,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Scores:
        """The causal mask (what `causal_mask` gave) with `score_bias` folded in, for all blocks."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        bias = None
        if self.has_score_bias:
            keys = seen_positions(mask, attention_mask, position_ids, past_key_values)
            bias = self.score_bias(position_ids, keys, inputs_embeds.dtype)
        return score_mask(self.config, mask, bias, past)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [batch, time, hidden_size] of input_ids [batch, time] or inputs_embeds [.., hidden_size].

        attention_mask: [batch, past + time] of 1 and 0, or a ready 4-D mask; position_ids [batch, time], counted from
        the mask where none are given. Raises ValueError for both or neither kind of input and for an empty sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        batch, time, _ = inputs_embeds.shape
        if time == 0:
            raise ValueError("the sequence is empty: give at least one token")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        given = position_ids
        if position_ids is None:
            position_ids = default_positions(attention_mask, batch, time, past, inputs_embeds.device)
        mask = causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, given)
        scores = self.scores(mask, inputs_embeds, position_ids, attention_mask, past_key_values)
        if scores.bias is not None:
            kwargs["position_bias"] = scores.bias
        hidden_states = self.encode(inputs_embeds, input_ids, position_ids, attention_mask, past_key_values)
        hidden_states = self.dropout(self.embedding_norm(hidden_states))
        turned = self.rotation(hidden_states, position_ids)
        for block in self.stack():
            hidden_states = block(
                hidden_states,
                scores.mask,
                past_key_values=past_key_values,
                position_embeddings=turned,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """A decoder (`decoder_class`) and a head to the vocabulary, tied to the embedding where the config says so."""

    decoder_class: ClassVar[type[Decoder]] = Decoder
    _tied_weights_keys = {"head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

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
    ) -> CausalLMOutputWithPast:
        """Logits [batch, time, vocab]; the loss where labels [batch, time] are given (shifted inside, -100 ignored).

        logits_to_keep: only the last so many positions (0: all), or the positions of an index tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
