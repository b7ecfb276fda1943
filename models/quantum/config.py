"""QuantumConfig: the sizes of a decoder whose states are complex vectors."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from models.layers import DecoderConfig


@strict
class QuantumConfig(DecoderConfig):
    """A decoder over complex states z of `hidden_size` / 2 numbers, kept as [Re z, Im z] in `hidden_size` features.

    A head, too, is `head_dim` / 2 complex numbers, its real parts first. `interference` adds the phase-space
    interference layer beside each feed-forward. `rope_parameters`, in transformers' format, turns the phase by the
    position; it applies to whole heads.

    Raises ValueError for odd sizes, for a partial rotation and for tied embeddings: the table holds amplitudes and
    phases, the head reads real and imaginary parts.
    """

    model_type = "quantum"

    norm: str = "rms"
    interference: bool = False
    rope_parameters: dict | None = None

    def validate_architecture(self) -> None:
        """Part of the validation that transformers runs on every new config."""
        super().validate_architecture()
        for name in ("hidden_size", "head_dim"):
            if (getattr(self, name) or 0) % 2:
                raise ValueError(f"{name} {getattr(self, name)} is odd: real and imaginary parts take half each")
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "rope_parameters: partial_rotary_factor would pair real parts with one another; leave it out"
            )
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings: the table holds amplitudes and phases, which are no weights of a head; set False"
            )
