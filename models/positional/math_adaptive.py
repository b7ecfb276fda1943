"""Position vectors that know about brackets and operators."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers import initialization as init

from models.layers import ExactBuffers
from models.layers.masks import real_keys
from models.layers.sinusoids import rates, waves
from models.positional.encoding import PositionEncoding
from models.positional.prefix import with_prefix
from models.positional.token_tables import CLASSES, LEVELS, TokenTables, neutral_tables, token_tables

COMPONENTS = ("hierarchy", "precedence", "depth", "scales", "kind")


class MathAdaptive(ExactBuffers, PositionEncoding):
    """x + sum_c softmax(w)_c component_c, five components of size d, the weights w learned and initially equal.

    Sinusoids have the amplitude `pe_options["amplitude"]` (see `amplitude.py`).

    hierarchy   sinusoids of the place within the innermost open bracket (of the whole text where none is open)
    precedence  a learned vector for the token's operator level: ^ over * / over + - over < > over =, or none
    depth       a learned vector for the number of open brackets; a bracket belongs to the depth inside
    scales      the mean of sinusoids of the position over three bases
    kind        a learned vector for the token's class: digit, letter, word, operator, bracket, ...

    Brackets are counted over everything before a token, cached tokens included: their counts travel in the cache as one
    more layer. All of it is looked up in per-token tables (`read`), which are saved with the model.

    Where only inputs_embeds come, a vector within 1 % of a token's embedding counts as that token; any other (a soft
    prompt) is neutral: no bracket, no operator, class "other". The same holds for ids beyond the tables, and for
    every token before `read` was given a tokenizer.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"amplitude": None, "max_depth": 15, "bases": [10_000.0, 1_000.0, 100.0]}
    adds = True
    tables: Tensor
    rates: Tensor  # [1 + bases, size / 2], of hierarchy and of scales

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.size, self.prefix_layer = config.hidden_size, config.num_hidden_layers
        self.amplitude = float(config.pe_options["amplitude"])
        self.max_depth = int(config.pe_options["max_depth"])
        self.bases = [float(base) for base in config.pe_options["bases"]]
        if self.max_depth < 1 or not self.bases:
            raise ValueError("math_adaptive: max_depth is a positive number and bases holds at least one")
        self.precedence = nn.Embedding(LEVELS, self.size)
        self.depth = nn.Embedding(self.max_depth + 1, self.size)
        self.kind = nn.Embedding(len(CLASSES), self.size)
        self.mixing = nn.Parameter(torch.zeros(len(COMPONENTS)))
        self.register_buffer("tables", neutral_tables(config.vocab_size))
        self.register_buffer("rates", self.fresh_rates(), persistent=False)

    def fresh_rates(self) -> Tensor:
        return torch.stack([rates(self.size, base) for base in (10_000.0, *self.bases)])

    def initialise(self, std: float) -> None:
        init.copy_(self.rates, self.fresh_rates())
        init.zeros_(self.mixing)
        init.zeros_(self.tables)

    def read(self, tokenizer: Any) -> None:
        """Fill the tables from the tokenizer's decoded strings."""
        self.tables.copy_(token_tables(tokenizer, self.tables.shape[1]))

    def resize(self, vocab_size: int) -> None:
        """Tables for another vocabulary size: kept where there were entries, neutral beyond."""
        made = neutral_tables(vocab_size).to(self.tables.device)
        kept = min(vocab_size, self.tables.shape[1])
        made[:, :kept] = self.tables[:, :kept]
        self.tables = made

    def look_up(self, input_ids: Tensor) -> TokenTables:
        """Table entries [batch, time] of ids [batch, time]; ids outside the tables (-1 too) are neutral."""
        inside = input_ids.clamp(0, self.tables.shape[1] - 1)
        found = self.tables.index_select(1, inside.flatten()).unflatten(1, inside.shape)
        return TokenTables(*(found * (inside == input_ids)).unbind())

    def add(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        embedding: nn.Module,
    ) -> Tensor:
        if input_ids is None:
            assert isinstance(embedding.weight, Tensor)
            input_ids = nearest_tokens(inputs_embeds, embedding.weight)
        tokens = self.look_up(input_ids)
        depth, place = self.structure(tokens, attention_mask, past_key_values, inputs_embeds.dtype)
        dtype = inputs_embeds.dtype
        hierarchy = self.amplitude * waves(place[..., None].float() * self.rates[0], self.size)
        scales = self.amplitude * waves(position_ids[..., None, None].float() * self.rates[1:], self.size).mean(-2)
        components = (
            hierarchy.to(dtype),
            self.precedence(tokens.precedence),
            self.depth(depth),
            scales.to(dtype),
            self.kind(tokens.kind),
        )
        for weight, component in zip(self.mixing.softmax(-1).unbind(), components, strict=True):
            inputs_embeds = torch.addcmul(inputs_embeds, weight, component)
        return inputs_embeds

    def structure(
        self, tokens: TokenTables, attention_mask: Any, past_key_values: Cache | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Bracket depth (at most `max_depth`) and place within the innermost bracket, both int64 [batch, time]."""
        time = tokens.opens.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        columns = torch.arange(time, device=tokens.opens.device) + past
        new = slice(past, past + time) if isinstance(past, int) else columns
        brackets = torch.stack((tokens.opens, tokens.closes, torch.ones_like(tokens.opens)), dim=-1)
        if (real := real_keys(attention_mask)) is not None:
            brackets = brackets * real[:, columns, None].to(brackets)  # a mask that is too short raises
        opens, closes, counted = with_prefix(brackets, past_key_values, self.prefix_layer, dtype).unbind(-1)
        change = opens - closes
        before = change.cumsum(1) - change
        outer = before - before.cummin(1).values.clamp(max=0)  # closing what was never opened leaves depth 0
        depth = outer + opens
        number = counted.cumsum(1)
        level = torch.arange(self.max_depth + 1, device=depth.device)[:, None]
        opened = (level > outer[:, None]) & (level <= depth[:, None])  # [batch, level, key]
        latest = torch.where(opened, number[:, None], 0).cummax(2).values[:, :, new]
        shown = depth[:, new].clamp(max=self.max_depth)
        start = latest.gather(1, shown[:, None])[:, 0]
        return shown, (number[:, new] - start).clamp(min=0)


def nearest_tokens(inputs_embeds: Tensor, table: Tensor, tolerance: float = 0.01, chunk: int = 256) -> Tensor:
    """The token whose embedding [vocab, d] each vector [batch, time, d] is, within `tolerance` of its length; or -1."""
    found = []
    with torch.no_grad():
        rows = table.detach().float()
        lengths = rows.square().sum(-1)
        for vectors in inputs_embeds.detach().float().flatten(0, 1).split(chunk):
            token = (2 * vectors @ rows.mT - lengths).argmax(-1)
            off = (vectors - rows[token]).norm(dim=-1) > tolerance * vectors.norm(dim=-1)
            found.append(token.masked_fill(off, -1))
    return torch.cat(found).view(inputs_embeds.shape[:2])
