"""Token states, time vectors, and the projector that brings them to the decoder's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from models.layers import RotaryEmbedding, SelfInitialised, turn
from models.staged.config import StagedConfig
from models.staged.widths import WidthScaled, changed


class TimeVectors(nn.Embedding, SelfInitialised):
    """One vector a token, zero at the start."""

    def initialise(self, std: float) -> None:
        init.zeros_(self.weight)


class TokenTable(nn.Embedding):
    """A token's semantic state [embed_dim] and behind it, from stage 1 on, its time vector [time_dim].

    One output, so that `inputs_embeds` carry both and no part of the model needs ids.
    """

    def __init__(self, config: StagedConfig) -> None:
        super().__init__(config.vocab_size, config.embed_dim)
        self.time = TimeVectors(config.vocab_size, config.time_dim) if config.stage >= 1 else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, time] -> [batch, time, embed_dim + time_dim]."""
        state = super().forward(input_ids)
        return state if self.time is None else torch.cat((state, self.time(input_ids)), dim=-1)

    def fit_time(self) -> None:
        """As many time vectors as states: transformers enlarges and cuts the states alone. New tokens get zeros."""
        if self.time is None or self.time.num_embeddings == self.num_embeddings:
            return
        old = self.time.weight
        rows = nn.functional.pad(old.detach(), (0, 0, 0, self.num_embeddings - len(old)))  # a negative pad cuts
        self.time.weight = nn.Parameter(rows, requires_grad=old.requires_grad)
        self.time.num_embeddings = self.num_embeddings


class QuietNorm(nn.LayerNorm, SelfInitialised):
    """A LayerNorm whose output starts at the scale of embeddings, not at 1.

    A stream of unit scale drowns what the operators add to it for hundreds of steps, and a norm that makes small states
    large makes their gradients larger than all others.
    """

    def initialise(self, std: float) -> None:
        init.constant_(self.weight, std)
        init.zeros_(self.bias)


class Projector(nn.Module):
    """LayerNorm(A state + B R(position) time): R turns the token's time vector by its position, as RoPE turns keys.

    A zero time vector stays zero wherever it stands, so a model that gets its time vectors starts as it was.
    """

    def __init__(self, config: StagedConfig) -> None:
        super().__init__()
        self.state_dim = config.embed_dim
        self.of_state = WidthScaled(config.embed_dim, config.hidden_size)
        self.of_time: WidthScaled | None = None
        if config.stage >= 1:
            self.of_time = WidthScaled(config.time_dim, config.hidden_size, bias=False)
            self.rotary = RotaryEmbedding(changed(config, head_dim=config.time_dim))
        self.norm = QuietNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, state: Tensor, time: Tensor, position_ids: Tensor) -> Tensor:
        """state [batch, time, embed_dim], time [batch, time, time_dim or 0] -> [batch, time, hidden_size]."""
        projected = self.of_state(state)
        if self.of_time is not None:
            turned = turn(time[:, None], *self.rotary(time, position_ids))[:, 0]
            projected = projected + self.of_time(turned)
        return self.norm(projected)
