"""GPT-2 without its position table."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from models.positional.config import PositionalGPT2Config
from models.positional.grafted import Grafted, GraftedAttention, InitialisesEncoding, NoTable
from models.positional.methods import make_encoding


class PositionalGPT2Attention(GraftedAttention, GPT2Attention):  # type: ignore[misc]
    """`c_attn` is a Conv1D [in, out]: its columns are all of q, all of k, all of v."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = self.c_attn(hidden_states).view(*hidden_states.shape[:-1], 3, self.num_heads, self.head_dim)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        return query, key, value

    def close(self, mixed: Tensor) -> Tensor:
        return self.resid_dropout(self.c_proj(mixed))

    def dropout_rate(self) -> float:
        return float(self.attn_dropout.p)


class PositionalGPT2Block(GPT2Block):
    """GPT2Block around that attention."""

    def __init__(self, config: PositionalGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attn = PositionalGPT2Attention(config, layer_idx=layer_idx)


class PositionalGPT2Model(InitialisesEncoding, GPT2Model):
    """GPT2Model with no table in `wpe`."""

    config_class = PositionalGPT2Config
    _no_split_modules = ["PositionalGPT2Block"]  # noqa: RUF012

    def __init__(self, config: PositionalGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = NoTable()  # type: ignore[assignment]
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(PositionalGPT2Block(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()


class PositionalGPT2ForCausalLM(Grafted, GPT2LMHeadModel):
    """GPT-2 with another position encoding; every other weight under GPT-2's own name."""

    config: PositionalGPT2Config
    config_class = PositionalGPT2Config
    _no_split_modules = ["PositionalGPT2Block"]  # noqa: RUF012

    def __init__(self, config: PositionalGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = PositionalGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.install(make_encoding(config))
        self.post_init()

    def prepare(self, *inputs: Any) -> dict[str, Any]:
        """GPT-2 makes no angles itself: they go along, to the attention of every layer."""
        prepared = super().prepare(*inputs)
        turned = self.encoding(prepared["inputs_embeds"], prepared["position_ids"])
        return prepared if turned is None else {**prepared, "position_embeddings": turned}
