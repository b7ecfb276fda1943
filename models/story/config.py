"""Configuration of the story model."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from models.layers import DecoderConfig


@strict
class StoryConfig(DecoderConfig):
    """Embedding times sqrt(hidden_size) plus sinusoids, pre-norm or post-norm blocks, an untied head.

    `attention` is "causal", or "bidirectional" to show what a label leak looks like: then every position sees the
    token that it has to predict, and the model is of no use for generating. `norm_placement="post"` is the report's.

    Raises ValueError where sizes do not fit together.
    """

    model_type = "story"

    attention: str = "causal"
    hidden_dropout: float | int = 0.1
    embedding_dropout: float | int = 0.1
    max_position_embeddings: int = 512

    def __post_init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.is_causal = self.attention == "causal"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.attention not in ("causal", "bidirectional"):
            raise ValueError(f'attention is "causal" or "bidirectional", not {self.attention!r}')
