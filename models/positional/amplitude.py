"""How loud sinusoids are beside the token embeddings that they are added to.

A sine has a root mean square of 1 / sqrt(2). Vaswani et al. bring the embeddings to that order by sqrt(d); a pretrained
base has embeddings of 0.02 to 0.2, and sinusoids of amplitude 1 would drown them. So the amplitude is sqrt(2) times the
embeddings' own root mean square: positions start as loud as tokens, and the learned scale takes it from there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from models.positional.methods import METHODS_BY_NAME


def fresh_amplitude(config: PreTrainedConfig) -> float:
    """For embeddings drawn from normal(0, initializer_range)."""
    return float(2**0.5 * config.initializer_range)


def measured_amplitude(embedding: Tensor) -> float:
    """For the trained embeddings [vocab, d] of a base."""
    return float(2**0.5 * embedding.detach().float().square().mean().sqrt())


def with_amplitude(method: str, options: dict[str, Any] | None, amplitude: float) -> dict[str, Any]:
    """The options with this amplitude where the method has one and none is given."""
    given = dict(options or {})
    if "amplitude" in METHODS_BY_NAME[method].OPTIONS and given.get("amplitude") is None:
        given["amplitude"] = amplitude
    return given
