"""Rotary position embedding (Su et al. 2021, "RoFormer"), tables in float32 whatever the model's type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from models.layers.initialisation import ExactBuffers, SelfInitialised


class RotaryEmbedding(ExactBuffers, SelfInitialised):
    """Angles position * theta_i, theta_i = base^(-2i / d_rot) (RoFormer, equation 15), or a scaling of transformers'.

    Reads `config.rope_parameters` (rope_type, rope_theta, partial_rotary_factor, ...) and `config.head_dim`. The
    frequencies stay float32 under `.half()`, `.bfloat16()` and `.double()`: position * theta needs the digits.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters.get("rope_type", "default")
        if self.rope_type != "default" and self.rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_parameters: rope_type {self.rope_type!r} is none of {known}")
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        frequencies, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def frequencies(self) -> tuple[Tensor, float]:
        """theta [d_rot / 2] in float32, and the factor of a scaling kind on cos and sin."""
        if self.rope_type != "default":
            compute: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[self.rope_type]
            return compute(self.config)
        parameters = self.config.rope_parameters
        head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        size = int(head * (parameters.get("partial_rotary_factor") or 1.0))
        if size % 2:
            raise ValueError(f"rotary embedding turns pairs: {size} dimensions of a head of {head} cannot be paired")
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)), 1.0

    def initialise(self, std: float) -> None:
        """Fill the tables anew: a model built on the meta device has none."""
        frequencies, self.attention_scaling = self.frequencies()
        init.copy_(self.inv_freq, frequencies)
        init.copy_(self.original_inv_freq, frequencies)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, time, d_rot] in the type of `hidden_states`, for position_ids [batch, time]."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self.attention_scaling
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first d_rot features of each head: x [batch, heads, time, head_dim], cos and sin [batch, time, d_rot].

    Pairs are (i, i + d_rot / 2), the order of Llama and GPT-NeoX; features beyond d_rot pass unchanged.
    """
    size = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, kept = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    first, second = turned.chunk(2, dim=-1)
    turned = torch.addcmul(turned * cos, torch.cat((-second, first), dim=-1), sin)
    return turned if kept is None else torch.cat((turned, kept), dim=-1)
