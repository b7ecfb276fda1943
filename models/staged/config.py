"""StagedConfig: which stage, and the sizes of its parts."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict

from models.layers import DecoderConfig
from models.staged.matrix import SIZE

STAGES = (0, 1, 2, 3)
SIZES: dict[str, dict[str, Any]] = {
    # under 100k parameters: tests; random states are seldom alike, so that a lower bound gives them edges
    "tiny": {
        "embed_dim": 32, "time_dim": 16, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "graph_similarity": 0.1,
    },
    # 3 M with 1,024 tokens: trains on a CPU in minutes
    "small": {
        "embed_dim": 128, "time_dim": 32, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
        "max_position_embeddings": 512,
    },
    # the report's: 160 M with GPT-2's 50,257 tokens
    "report": {
        "embed_dim": 512, "time_dim": 128, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
        "max_position_embeddings": 1024, "graph_window": 16, "graph_probability": 1 / 32,
    },
}  # fmt: skip


@strict
class StagedConfig(DecoderConfig):
    """A decoder whose parts are switched on one stage at a time: 0 MU, 1 TEMPORAL, 2 K-1, 3 graph routing.

    - `use_full_model`: the token state is an 8x8 matrix that MU updates; without it a plain embedding of `embed_dim`.
    - `time_dim`: width of the time vectors (from stage 1 on).
    - `graph_window`, `graph_probability`, `graph_similarity`, `graph_seed`: the edges of stage 3 (`graph.py`).
    - `graph_openness`: how much of its weight a token without an edge keeps; 1 is dense attention (a model starts
      stage 3 there), 0 is the graph alone. Training lowers it.

    `num_hidden_layers` counts the operators. Raises what DecoderConfig raises; among the reasons is a graph that
    leaves earlier tokens out of reach.
    """

    model_type = "staged"

    stage: int = 0
    use_full_model: bool = False
    embed_dim: int = SIZE
    time_dim: int = 16
    graph_window: int = 8
    graph_probability: float | int = 0.125
    graph_similarity: float | int = 0.5
    graph_seed: int = 0
    graph_openness: float | int = 1.0
    rope_parameters: dict | None = None

    @classmethod
    def sized(cls, size: str, stage: int = 0, **changes: Any) -> StagedConfig:
        """A named size: "tiny", "small" or "report". Raises ValueError for another."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        sizes = dict(SIZES[size])
        if changes.get("use_full_model"):
            sizes["embed_dim"] = SIZE
        return cls(**{**sizes, "stage": stage, **changes})

    @property
    def graph_stretch(self) -> int:
        """Of so many tokens in a row a query has a shortcut to one: each is linked with probability 1 / stretch."""
        return max(1, round(1 / self.graph_probability))

    @property
    def routes(self) -> bool:
        """Whether attention is anything but dense."""
        return self.stage >= 3 and self.graph_openness < 1 and self.graph_stretch > 1

    @property
    def units(self) -> int:
        """How many of the model's blocks are MU and stand in front of the operators."""
        return int(self.use_full_model)

    @property
    def attention_layers(self) -> list[str]:
        """How far each block sees by itself, for whoever asks: routed operators see everything together only."""
        return ["global"] * self.units + ["graph" if self.routes else "global"] * self.num_hidden_layers

    @property
    def absolute_position_scores(self) -> bool:
        """Whether absolute positions are felt, for whoever asks: TEMPORAL brings them in behind MU."""
        return self.stage >= 1

    def validate_architecture(self) -> None:
        """Part of the validation that transformers runs on every new config."""
        super().validate_architecture()
        if self.stage not in STAGES:
            raise ValueError(f"stage is one of {', '.join(map(str, STAGES))}, not {self.stage}")
        if self.use_full_model and self.embed_dim != SIZE:
            raise ValueError(
                f"use_full_model makes the state a matrix of {SIZE} numbers: embed_dim is {self.embed_dim}"
            )
        if self.time_dim < 2 or self.time_dim % 2 or self.embed_dim < 2:
            raise ValueError(
                f"time_dim {self.time_dim} must be even (vectors are turned in pairs), embed_dim at least 2"
            )
        if not 0 <= self.graph_openness <= 1:
            raise ValueError(f"graph_openness is a share, from 0 to 1, not {self.graph_openness}")
        if not 0 < self.graph_probability <= 1:
            raise ValueError(f"graph_probability is above 0 and at most 1, not {self.graph_probability}")
        reach = (self.num_hidden_layers - 1) * self.graph_window
        if self.graph_stretch - 1 > reach:
            raise ValueError(
                f"graph_probability {self.graph_probability:g} leaves earlier tokens out of reach: shortcuts are up to "
                f"{self.graph_stretch} tokens apart and the other {self.num_hidden_layers - 1} layers of window "
                f"{self.graph_window} bridge {reach}; at least {1 / (reach + 1):.3g} is needed"
            )
