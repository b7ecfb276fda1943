"""Llama without its native rotary embedding."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm

from models.positional.config import PositionalLlamaConfig
from models.positional.encoding import PositionEncoding
from models.positional.grafted import Grafted, GraftedAttention, InitialisesEncoding, MaskByPlace, NoRotation
from models.positional.methods import make_encoding


class PositionalLlamaAttention(GraftedAttention, LlamaAttention):  # type: ignore[misc]
    """Separate projections; several query heads may share a key and value head."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            made(hidden_states).view(shape).transpose(1, 2) for made in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def close(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed)

    def dropout_rate(self) -> float:
        return float(self.attention_dropout or 0.0)


class PositionalLlamaLayer(MaskByPlace, LlamaDecoderLayer):
    """LlamaDecoderLayer around that attention."""

    def __init__(self, config: PositionalLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = PositionalLlamaAttention(config, layer_idx)


class PositionalLlamaModel(InitialisesEncoding, LlamaModel):
    """LlamaModel whose `rotary_emb` turns nothing until an encoding takes its place."""

    config_class = PositionalLlamaConfig
    _no_split_modules = ["PositionalLlamaLayer"]  # noqa: RUF012

    def __init__(self, config: PositionalLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(PositionalLlamaLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb: nn.Module = NoRotation()  # type: ignore[assignment]
        self.gradient_checkpointing = False
        self.post_init()


class PositionalLlamaForCausalLM(Grafted, LlamaForCausalLM):
    """Llama with another position encoding; every other weight under Llama's own name."""

    config: PositionalLlamaConfig
    config_class = PositionalLlamaConfig
    _no_split_modules = ["PositionalLlamaLayer"]  # noqa: RUF012

    def __init__(self, config: PositionalLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PositionalLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.install(make_encoding(config))
        self.post_init()

    def install(self, encoding: PositionEncoding) -> None:
        super().install(encoding)
        if encoding.turns:
            self.model.rotary_emb = encoding
