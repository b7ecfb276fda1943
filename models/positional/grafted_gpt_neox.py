"""GPT-NeoX (Pythia) without its native rotary embedding."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, GPTNeoXModel, GPTNeoXPreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXLayer

from models.positional.config import PositionalGPTNeoXConfig
from models.positional.encoding import PositionEncoding
from models.positional.grafted import Grafted, GraftedAttention, InitialisesEncoding, MaskByPlace, NoRotation
from models.positional.methods import make_encoding


class PositionalGPTNeoXAttention(GraftedAttention, GPTNeoXAttention):  # type: ignore[misc]
    """`query_key_value` has one group of rows a head: its q, its k, its v."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*hidden_states.shape[:-1], -1, 3 * self.head_size)
        by_head = self.query_key_value(hidden_states).view(shape).transpose(1, 2)
        query, key, value = by_head.chunk(3, dim=-1)
        return query, key, value

    def close(self, mixed: Tensor) -> Tensor:
        return self.dense(mixed)

    def dropout_rate(self) -> float:
        return float(self.attention_dropout)


class PositionalGPTNeoXLayer(MaskByPlace, GPTNeoXLayer):
    """GPTNeoXLayer around that attention."""

    def __init__(self, config: PositionalGPTNeoXConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention = PositionalGPTNeoXAttention(config, layer_idx)


class PositionalGPTNeoXModel(InitialisesEncoding, GPTNeoXModel):
    """GPTNeoXModel whose `rotary_emb` turns nothing until an encoding takes its place."""

    config_class = PositionalGPTNeoXConfig
    _no_split_modules = ["PositionalGPTNeoXLayer"]  # noqa: RUF012

    def __init__(self, config: PositionalGPTNeoXConfig) -> None:
        GPTNeoXPreTrainedModel.__init__(self, config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(PositionalGPTNeoXLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb: nn.Module = NoRotation()  # type: ignore[assignment]
        self.gradient_checkpointing = False
        self.post_init()


class PositionalGPTNeoXForCausalLM(Grafted, GPTNeoXForCausalLM):
    """GPT-NeoX with another position encoding; every other weight under GPT-NeoX's own name."""

    config: PositionalGPTNeoXConfig
    config_class = PositionalGPTNeoXConfig
    _no_split_modules = ["PositionalGPTNeoXLayer"]  # noqa: RUF012

    def __init__(self, config: PositionalGPTNeoXConfig) -> None:
        GPTNeoXPreTrainedModel.__init__(self, config)
        self.gpt_neox = PositionalGPTNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.install(make_encoding(config))
        self.post_init()

    def install(self, encoding: PositionEncoding) -> None:
        super().install(encoding)
        if encoding.turns:
            self.gpt_neox.rotary_emb = encoding  # type: ignore[assignment]
