"""Models of transformers in a stated shape, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform.subject import BuildError, Subject, as_subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "transformers:"


@dataclass(frozen=True)
class Shape:
    """The sizes that set a decoder's cost; by default those of GPT-2 small, the "124 M shape"."""

    vocabulary: int = 50_257
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    context: int = 1024


SHAPES = {"124m": Shape()}
TINY = "tiny"
NAMES = (TINY, *SHAPES)


def of_transformers(model_type: str, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """That architecture in that shape: float32 on the CPU, eval mode, as many key/value heads as heads.

    Whatever else sets its cost (experts, gates, tied embeddings) is its config class's default. Raises BuildError
    where the config does not take the sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from lmconform.shrinking import UnknownType, causal_types

    if model_type not in causal_types():
        raise BuildError(str(UnknownType(model_type)))
    sizes = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
        "head_dim": shape.width // shape.heads, "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.context,
    }  # fmt: skip
    config_class: Any = CONFIG_MAPPING[model_type]
    try:
        default = config_class()
        wanted = {name: size for name, size in sizes.items() if hasattr(default, name)}
        config = config_class(**wanted)
        taken = {name: getattr(config, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        if any(taken[name] != sizes[name] for name in taken):
            raise ValueError(f"its config says {taken}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as error:
        raise BuildError(f"{PREFIX}{model_type} does not come in the shape {shape}: {error}") from error


def shaped_subject(spec: str, shape: str, *, trust_remote_code: bool = False) -> Subject:
    """The Subject of a SPEC; `transformers:TYPE` comes in the shape of that name. Raises BuildError."""
    subject = as_subject(spec, trust_remote_code=trust_remote_code)
    if shape == TINY or not spec.startswith(PREFIX):
        return subject
    model_type = spec.removeprefix(PREFIX)
    shaped = Subject(lambda: of_transformers(model_type, SHAPES[shape]), name=f"{model_type} ({shape})")
    shaped.spec = spec
    return shaped
