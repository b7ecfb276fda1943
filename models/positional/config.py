"""Configurations: the own decoder's and those of the grafted bases, each its base's plus a method and its options."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from models.layers import DecoderConfig
from models.positional.amplitude import fresh_amplitude, with_amplitude
from models.positional.methods import complete_options

SIZES: dict[str, dict[str, Any]] = {
    # under 100k parameters: tests
    "tiny": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256},
    # 3 M: trains on a CPU in minutes
    "small": {
        "vocab_size": 1024, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
        "max_position_embeddings": 512,
    },
    # the report's base: Pythia 2.8 B
    "pythia-2.8b": {
        "vocab_size": 50304, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 10240, "use_parallel_residual": True, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def settle(config: PreTrainedConfig) -> None:
    """Complete the options; without rope there are no rotary parameters: the base's own are removed."""
    options = complete_options(config.pe_method, config.pe_options)
    config.pe_options = with_amplitude(config.pe_method, options, fresh_amplitude(config))
    if config.pe_method != "rope":
        config.rope_parameters = {}


class StatesItsScores:
    """What a config says of its scores, for whoever asks whether shifting all positions may matter."""

    pe_method: str
    pe_options: dict | None

    @property
    def absolute_position_scores(self) -> bool:
        """Whether attention scores depend on the absolute position by definition, as DIET-ABS's do."""
        return self.pe_method == "diet" and (self.pe_options or {}).get("kind") == "abs"


@strict
class PositionalConfig(StatesItsScores, DecoderConfig):
    """The own decoder with `pe_method`: rope, sinusoidal, t5_relative, diet, alibi or math_adaptive.

    pe_options: what the method's OPTIONS name. rope_parameters: for rope, in transformers' format. An unknown method or
    option raises ValueError.
    """

    model_type = "positional"

    pe_method: str = "rope"
    pe_options: dict | None = None
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        settle(self)

    @classmethod
    def sized(cls, size: str, pe_method: str = "rope", **changes: Any) -> PositionalConfig:
        """A named size: "tiny", "small" or "pythia-2.8b". Raises ValueError for another."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        if size == "pythia-2.8b" and pe_method == "rope":
            changes.setdefault("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25})
        return cls(pe_method=pe_method, **{**SIZES[size], **changes})


@strict
class PositionalGPT2Config(StatesItsScores, GPT2Config):
    """GPT-2 without its position table, with `pe_method`."""

    model_type = "positional_gpt2"

    pe_method: str = "rope"
    pe_options: dict | None = None
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        settle(self)


@strict
class PositionalGPTNeoXConfig(StatesItsScores, GPTNeoXConfig):
    """GPT-NeoX (Pythia) without its native rotary embedding, with `pe_method`; rope keeps the base's share."""

    model_type = "positional_gpt_neox"

    pe_method: str = "rope"
    pe_options: dict | None = None

    def __post_init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        settle(self)


@strict
class PositionalLlamaConfig(StatesItsScores, LlamaConfig):
    """Llama without its native rotary embedding, with `pe_method`."""

    model_type = "positional_llama"

    pe_method: str = "rope"
    pe_options: dict | None = None

    def __post_init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        settle(self)
