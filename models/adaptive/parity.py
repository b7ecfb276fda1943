"""Layer by layer: an adaptive model beside the GPT-2 it came from, or beside itself before it was pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerParity:
    """One hidden state, [batch, time, width] in both models. `layer` 0 is the embedding.

    `rms_ratio` is ours over theirs; `difference` the largest absolute difference over their RMS.
    """

    layer: int
    rms: float
    reference_rms: float
    rms_ratio: float
    difference: float


@dataclass(frozen=True)
class Parity:
    """All layers, and the logits: their largest absolute difference and the share of equal likeliest tokens."""

    layers: list[LayerParity]
    logits_difference: float
    same_top_token: float

    @property
    def worst_ratio(self) -> float:
        """The largest |ratio - 1| of any layer."""
        return max(abs(layer.rms_ratio - 1) for layer in self.layers)


@torch.no_grad()
def compare_hidden_states(ours: nn.Module, theirs: nn.Module, input_ids: Tensor) -> Parity:
    """Both models on the same ids [batch, time]. Raises ValueError where they have not the same number of layers."""
    mine, other = (model(input_ids=input_ids, output_hidden_states=True) for model in (ours, theirs))
    if len(mine.hidden_states) != len(other.hidden_states):
        raise ValueError(f"{len(mine.hidden_states) - 1} layers beside {len(other.hidden_states) - 1}")
    layers = []
    for index, (a, b) in enumerate(zip(mine.hidden_states, other.hidden_states)):
        rms, reference = float(a.double().square().mean().sqrt()), float(b.double().square().mean().sqrt())
        difference = float((a.double() - b.double()).abs().max()) / reference
        layers.append(LayerParity(index, rms, reference, rms / reference, difference))
    return Parity(
        layers,
        float((mine.logits.double() - other.logits.double()).abs().max()),
        float((mine.logits.argmax(-1) == other.logits.argmax(-1)).double().mean()),
    )


def plot(parities: Mapping[str, Parity], file: str | Path) -> None:
    """RMS of the hidden states by layer, and its ratio to the reference, one line a name. The file's ending tells how
    it is drawn (.png, .svg, .pdf)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, (name, parity) in enumerate(parities.items()):
        places: Sequence[int] = [layer.layer for layer in parity.layers]
        if index == 0:
            left.plot(places, [layer.reference_rms for layer in parity.layers], "k--", label="reference")
        left.plot(places, [layer.rms for layer in parity.layers], marker="o", label=name)
        right.plot(places, [layer.rms_ratio for layer in parity.layers], marker="o", label=name)
    left.set(xlabel="layer (0: embedding)", ylabel="RMS of the hidden state")
    right.set(xlabel="layer (0: embedding)", ylabel="RMS ratio to the reference")
    right.axhline(1, color="k", linestyle="--", linewidth=1)
    left.legend()
    right.legend()
    figure.savefig(file)


def as_json(parity: Parity) -> dict[str, Any]:
    return {
        "logits_difference": parity.logits_difference,
        "same_top_token": parity.same_top_token,
        "layers": [vars(layer) for layer in parity.layers],
    }
