"""AdaptiveConfig: GPT-2's sizes and switches, and which heads are left."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class AdaptiveConfig(PreTrainedConfig):
    """A GPT-2 whose heads carry gates. The fields of GPT-2's config keep their names and defaults.

    - `skips`: U-Net connections from the lower half of the layers to the upper half.
    - `kept_heads`: for each layer the heads that are left, by their number in the unpruned model; None where nothing
      has been removed. A checkpoint of a pruned model is built at its own, smaller sizes from this.

    Raises ValueError for a width that the heads do not divide, and for kept heads that do not fit the sizes.
    """

    model_type = "adaptive"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012 - the library's own form
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    skips: bool = False
    kept_heads: list[list[int]] | None = None

    def validate_architecture(self) -> None:
        """Part of the library's validation of a config."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.kept_heads is None:
            return
        if len(self.kept_heads) != self.n_layer:
            raise ValueError(f"kept_heads names {len(self.kept_heads)} layers, the model has {self.n_layer}")
        for layer, heads in enumerate(self.kept_heads):
            if not heads or heads != sorted(set(heads)) or heads[0] < 0 or heads[-1] >= self.n_head:
                raise ValueError(
                    f"kept_heads of layer {layer} is {heads}: expected at least one head, each once, in order, "
                    f"from 0 to {self.n_head - 1}"
                )

    def heads_of(self, layer: int) -> list[int]:
        """The heads that are left in that layer, by their number in the unpruned model."""
        return list(range(self.n_head)) if self.kept_heads is None else self.kept_heads[layer]
