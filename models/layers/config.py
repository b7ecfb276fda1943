"""The configuration that every decoder built from these layers understands."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DecoderConfig(PreTrainedConfig):
    """Sizes and kinds of a decoder-only transformer.

    `norm` is "layer" or "rms", `norm_placement` "pre" (x + f(norm(x)), final norm) or "post" (norm(x + f(x)), none).
    `gated` chooses the gated feed-forward (SwiGLU with `hidden_act="silu"`). `attention_scale` multiplies the scores:
    None means 1 / sqrt(head_dim). A subclass that turns q and k adds the field `rope_parameters: dict | None = None`,
    in transformers' own format. `is_causal = False` lifts the causal mask, as everywhere in transformers.

    Sizes that do not fit together raise huggingface_hub's StrictDataclassClassValidationError, with the reason.
    """

    model_type = "lm_decoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own spelling)

    vocab_size: int = 97
    hidden_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    gated: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_placement: str = "pre"
    use_parallel_residual: bool = False
    embedding_norm: bool = False
    attention_bias: bool = True
    feed_forward_bias: bool = True
    attention_scale: float | None = None
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3

    def __post_init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the validation that transformers runs on every new config."""
        if self.head_dim is not None and self.head_dim * self.num_attention_heads > 8 * self.hidden_size:
            raise ValueError(f"head_dim {self.head_dim} x {self.num_attention_heads} heads is out of proportion")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key and value heads evenly"
            )
        if self.norm not in ("layer", "rms"):
            raise ValueError(f'norm is "layer" or "rms", not {self.norm!r}')
        if self.norm_placement not in ("pre", "post"):
            raise ValueError(f'norm_placement is "pre" or "post", not {self.norm_placement!r}')
        if self.use_parallel_residual and self.norm_placement == "post":
            raise ValueError("use_parallel_residual is defined for pre-norm blocks: set norm_placement to 'pre'")
