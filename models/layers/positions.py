"""Where tokens stand: positions of queries and keys, such that padding on either side changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def default_positions(
    attention_mask: Tensor | None, batch: int, time: int, past: int | Tensor, device: torch.device
) -> Tensor:
    """Positions of the new tokens when none are given: [batch, time], or [1, time] where all rows count alike.

    With a padding mask [batch, past + time] only real tokens count; padding stands at 0. Otherwise past, past + 1, ...
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return (torch.arange(time, device=device) + past)[None]
    counted = (attention_mask.to(device).long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, -time:]


def key_positions(positions: Tensor, mask: Tensor | None, length: int, past: int | Tensor) -> Tensor:
    """Positions of all keys [batch or 1, length], from those of the new tokens.

    positions: [batch or 1, time], the new tokens'. mask: [batch, at most length], 1 for real tokens, or None. `past`
    keys are cached already. A cached key stands as many real tokens before the first new one as the mask counts, so
    explicit positions may start anywhere; among the new tokens the given positions hold as they are.
    """
    time = positions.shape[1]
    if isinstance(past, int) and past == 0 and length == time:
        return positions
    columns = torch.arange(length, device=positions.device)
    if mask is None and time == 1:
        return positions + (columns - past)
    new = columns[:time] + past
    if mask is None:
        keys = positions[:, :1] + (columns - past)
    else:
        real = torch.nn.functional.pad(mask.to(positions.device).long(), (0, length - mask.shape[-1]))
        counted = real.cumsum(-1) - 1
        first = real[:, new].argmax(-1, keepdim=True)  # the first real new token anchors the row
        given = positions.expand(real.shape[0], -1).gather(1, first)
        keys = counted + (given - counted[:, new].gather(1, first))
    return keys.index_copy(1, new, positions.expand(keys.shape[0], -1).to(keys.dtype))
