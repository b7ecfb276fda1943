"""The adaptive model: GPT-2 (Radford et al. 2019), a gate on every head, optional U-Net skips, heads that can go.

Parameter names are GPT-2's own, so its checkpoints load as they are. Shapes: B batch, T new tokens, S all tokens seen
(past and new), D width, L layers, H heads of the unpruned model, h heads left in a layer, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GPT2LMHeadModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from models.adaptive.config import AdaptiveConfig


def eager_attention(
    module: AdaptiveAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which gives the weights too.

    query [B, h, T, E], key and value [B, h, S, E], mask added to the scores [B, 1, T, S]; returns the heads' outputs
    [B, T, h, E] and the weights [B, h, T, S].
    """
    if module.config.reorder_and_upcast_attn:  # GPT-2's switch for half precision: scores and softmax in float32
        with maybe_autocast(query.device.type, enabled=False):
            scores = query.float() @ key.float().transpose(-1, -2) * scaling
    else:
        scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).to(value.dtype)
    mixed = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return mixed.transpose(1, 2), weights


class AdaptiveAttention(nn.Module):
    """Causal self-attention whose heads are weighed by gates before the output projection.

    Pruned heads have no columns in `c_attn` and no rows in `c_proj`: Conv1D keeps its matrix as [in, out], so the
    heads lie side by side along the *rows* of the output projection.
    """

    kept: Tensor | None

    def __init__(self, config: AdaptiveConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        heads = config.heads_of(layer_idx)
        inner = len(heads) * self.head_dim
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = Conv1D(3 * inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attn_dropout = config.attn_pdrop
        self.is_causal = True  # read by the attention functions of transformers
        pruned = len(heads) < config.n_head
        self.register_buffer("kept", torch.tensor(heads) if pruned else None, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        gates: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D], gates [H], mask as `create_causal_mask` makes it -> [B, T, D], weights or None."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )  # each [B, h, T, E]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self, query, key, value, attention_mask,
            scaling=self.scaling, dropout=self.attn_dropout if self.training else 0.0, **kwargs,
        )  # fmt: skip
        if self.kept is not None:
            gates = gates[self.kept]
        mixed = mixed * gates.to(mixed.dtype)[:, None]  # [B, T, h, E]: all heads at once, the bias is added behind it
        return self.resid_dropout(self.c_proj(mixed.flatten(-2))), weights

    @torch.no_grad()
    def keep(self, heads: list[int]) -> None:
        """Take all other heads out. `heads` are numbers of the unpruned model; the gates are the caller's matter."""
        before = self.config.heads_of(self.layer_idx)
        places = torch.tensor([before.index(head) for head in heads], device=self.c_attn.weight.device)
        columns = (places[:, None] * self.head_dim + torch.arange(self.head_dim, device=places.device)).flatten()
        inner = len(before) * self.head_dim
        fused = torch.cat([columns, columns + inner, columns + 2 * inner])  # q, k and v
        attn, proj = self.c_attn, self.c_proj
        attn.weight = nn.Parameter(attn.weight[:, fused].clone(), requires_grad=attn.weight.requires_grad)
        attn.bias = nn.Parameter(attn.bias[fused].clone(), requires_grad=attn.bias.requires_grad)
        proj.weight = nn.Parameter(proj.weight[columns].clone(), requires_grad=proj.weight.requires_grad)
        attn.nf, proj.nx = 3 * len(columns), len(columns)  # what Conv1D says of itself
        self.kept = torch.tensor(heads, device=places.device)


class AdaptiveMLP(nn.Module):
    """Feed-forward [B, T, D] -> [B, T, D]; the activation is the config's, in GPT-2 the tanh form of GELU."""

    def __init__(self, config: AdaptiveConfig) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class SkipConnection(nn.Module):
    """x + scale * W [x; lower] + scale * b, with W [2D -> D]. `scale` starts at 0, so that it changes nothing then."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, lower: Tensor) -> Tensor:
        """Both [B, T, D]."""
        return hidden_states + self.scale * self.mix(torch.cat([hidden_states, lower], dim=-1))


class AdaptiveBlock(GradientCheckpointingLayer):
    """Pre-LN block: an upper one with skips first takes in the output of the lower one that mirrors it."""

    def __init__(self, config: AdaptiveConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = AdaptiveAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = AdaptiveMLP(config)
        upper = config.skips and layer_idx > config.n_layer - 1 - layer_idx
        self.skip = SkipConnection(config.n_embd) if upper else None

    def forward(
        self,
        hidden_states: Tensor,
        gates: Tensor,
        lower: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states and lower [B, T, D], gates [H]: what carries a gradient comes first, for checkpointing."""
        if self.skip is not None and lower is not None:
            hidden_states = self.skip(hidden_states, lower)
        mixed, _ = self.attn(self.ln_1(hidden_states), gates, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class AdaptivePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes below."""

    config: AdaptiveConfig
    config_class = AdaptiveConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AdaptiveBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": AdaptiveBlock,
        "attentions": OutputRecorder(AdaptiveAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's scheme: N(0, 0.02), projections into the residual stream smaller by sqrt(2L); gates exactly 1."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Conv1D):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, AdaptiveAttention | AdaptiveMLP):
            init.normal_(module.c_proj.weight, mean=0.0, std=std / (2 * self.config.n_layer) ** 0.5)
            if isinstance(module, AdaptiveAttention) and module.kept is not None:  # not saved, so made again here
                init.copy_(module.kept, torch.tensor(self.config.heads_of(module.layer_idx)))
        elif isinstance(module, SkipConnection):
            init.zeros_(module.scale)
        elif isinstance(module, AdaptiveModel):
            init.ones_(module.gates)


class AdaptiveModel(AdaptivePreTrainedModel):
    """The decoder without its head. `gates` [L, H] is one parameter, in the numbering of the unpruned model."""

    def __init__(self, config: AdaptiveConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.gates = nn.Parameter(torch.ones(config.n_layer, config.n_head))
        self.h = nn.ModuleList(AdaptiveBlock(config, index) for index in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = cast("nn.Embedding", value)

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
        """input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, S] of 1 and 0; position_ids [B, T].

        Positions are counted over the tokens that the mask shows, where they are not given: padding on either side
        changes nothing. Raises ValueError unless exactly one of input_ids and inputs_embeds is given, and for more
        tokens than there are positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        time = inputs_embeds.shape[1]
        if time > self.config.n_positions:
            raise ValueError(f"{time} tokens at once: the model has {self.config.n_positions} positions (n_positions)")
        if use_cache and self.gradient_checkpointing and self.training:
            use_cache = False  # a block that is computed again must not write its keys again
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, past_key_values)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device))
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        outputs: list[Tensor] = []  # of the lower half, for the layers that mirror them
        for index, block in enumerate(self.h):
            mirror = self.config.n_layer - 1 - index
            lower = outputs[mirror] if self.config.skips and mirror < index else None
            hidden_states = block(
                hidden_states, self.gates[index], lower,
                attention_mask=mask, past_key_values=past_key_values, position_ids=position_ids, **kwargs,
            )  # fmt: skip
            if self.config.skips and index < mirror:
                outputs.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    @staticmethod
    def _positions(inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        """[1 or B, T]: the number of tokens before each one that the mask shows; a hidden token takes 0."""
        time = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(time, device=inputs_embeds.device) + past)[None]


class AdaptiveForCausalLM(AdaptivePreTrainedModel, GenerationMixin):
    """The language model; `AdaptiveForCausalLM.from_gpt2("gpt2")` starts from a pretrained GPT-2.

    With gates at 1 and skips off (or untrained) its logits are GPT-2's own. `gates[layer, head] = 0` closes a head,
    `prune_heads()` removes the closed ones.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: AdaptiveConfig) -> None:
        super().__init__(config)
        self.transformer = AdaptiveModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @property
    def gates(self) -> nn.Parameter:
        """[L, H], one gate per layer and head, in the numbering of the unpruned model; 0 at heads that are gone."""
        return self.transformer.gates

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
        """Logits [B, T, vocab], or those of the last `logits_to_keep` tokens (or of the positions it lists).

        `labels` [B, T] stand at their own token (the shift is made here); -100 is not counted.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_gpt2(
        cls, model_or_path: GPT2LMHeadModel | str | Path, *, skips: bool = False, **loading: Any
    ) -> AdaptiveForCausalLM:
        """The same function as that GPT-2, with gates at 1: config and weights are copied, the source is untouched.

        `model_or_path` is a GPT2LMHeadModel, a directory or a hub id; `loading` goes to its `from_pretrained`. Data
        type, device, attention implementation, train/eval mode and generation settings are taken over. Raises
        TypeError for another kind of model, ValueError for another kind of checkpoint or one with cross-attention.
        """
        if isinstance(model_or_path, str | Path):
            kind = AutoConfig.from_pretrained(model_or_path).model_type
            if kind != "gpt2":
                raise ValueError(f"{model_or_path} is a checkpoint of type {kind!r}, not of GPT-2")
            source = GPT2LMHeadModel.from_pretrained(model_or_path, **loading)
        elif isinstance(model_or_path, GPT2LMHeadModel):
            source = model_or_path
        else:
            raise TypeError(f"from_gpt2 takes a GPT2LMHeadModel or a path, not {type(model_or_path).__name__}")
        if source.config.add_cross_attention:
            raise ValueError("this GPT-2 has cross-attention, and a decoder-only model has no use for it")
        theirs = source.config.to_dict()
        taken = {name: theirs[name] for name in AdaptiveConfig.__dataclass_fields__ if name in theirs}
        for own in ("transformers_version", "architectures", "model_type", "kept_heads"):
            taken.pop(own, None)
        config = AdaptiveConfig(**taken | {"skips": skips})
        config._attn_implementation = source.config._attn_implementation
        made = cls(config)
        nn.Module.to(made, source.device, source.dtype)
        found = made.load_state_dict(source.state_dict(), strict=False)
        strange = [name for name in found.missing_keys if name != "transformer.gates" and ".skip." not in name]
        if strange or found.unexpected_keys:
            raise ValueError(f"weights that do not fit: missing {strange}, unexpected {found.unexpected_keys}")
        made.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
        return made.train(source.training)

    def closed_heads(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are still there and whose gate is 0."""
        gates = self.gates.detach().cpu()
        return [
            (layer, head)
            for layer in range(self.config.n_layer)
            for head in self.config.heads_of(layer)
            if gates[layer, head] == 0
        ]

    @torch.no_grad()
    def prune_heads(self, heads: Mapping[int, Iterable[int]] | None = None) -> dict[int, list[int]]:
        """Remove heads for good: smaller matrices, and the logits that gating them to 0 gave.

        `heads` gives {layer: heads}, in the numbering of the unpruned model; None stands for all closed heads. The
        last head of a layer stays, closed: key-value caches measure their length on it. The config remembers what is
        left, so the model saves and loads as it is. Parameters are new tensors afterwards: make the optimizer after
        this. Returns what was removed. Raises ValueError for a layer or head that is not there.
        """
        if heads is None:
            wanted: dict[int, set[int]] = {}
            for layer, head in self.closed_heads():
                wanted.setdefault(layer, set()).add(head)
        else:
            wanted = {layer: set(some) for layer, some in heads.items()}
        for layer, some in wanted.items():
            if not 0 <= layer < self.config.n_layer:
                raise ValueError(f"there is no layer {layer}: the model has {self.config.n_layer}")
            if strange := sorted(some - set(self.config.heads_of(layer))):
                raise ValueError(f"layer {layer} has no head {strange[0]}: it has {self.config.heads_of(layer)}")
        kept = [self.config.heads_of(layer) for layer in range(self.config.n_layer)]
        removed: dict[int, list[int]] = {}
        for layer, some in sorted(wanted.items()):
            self.gates[layer, sorted(some)] = 0
            rest = [head for head in kept[layer] if head not in some] or kept[layer][:1]
            gone = [head for head in kept[layer] if head not in rest]
            if gone:
                cast("AdaptiveAttention", self.transformer.h[layer].attn).keep(rest)
                kept[layer], removed[layer] = rest, gone
        if removed:
            self.config.kept_heads = kept
        return removed
