"""graft: give a pretrained model another position encoding."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.positional.amplitude import measured_amplitude, with_amplitude
from models.positional.config import PositionalGPT2Config, PositionalGPTNeoXConfig, PositionalLlamaConfig
from models.positional.grafted import Grafted
from models.positional.grafted_gpt2 import PositionalGPT2ForCausalLM
from models.positional.grafted_gpt_neox import PositionalGPTNeoXForCausalLM
from models.positional.grafted_llama import PositionalLlamaForCausalLM
from models.positional.methods import complete_options, make_encoding

BASES: dict[str, tuple[Any, type[Grafted]]] = {
    "gpt2": (PositionalGPT2Config, PositionalGPT2ForCausalLM),
    "gpt_neox": (PositionalGPTNeoXConfig, PositionalGPTNeoXForCausalLM),
    "llama": (PositionalLlamaConfig, PositionalLlamaForCausalLM),
}

REMOVED = {"transformer.wpe.weight"}
"""Weights of the bases that belong to their own encoding and are left behind; rotary tables are not saved at all."""


def graft(
    base: PreTrainedModel | str | os.PathLike[str],
    method: str,
    *,
    tokenizer: Any = None,
    options: dict[str, Any] | None = None,
    rope_parameters: dict[str, Any] | None = None,
) -> Grafted:
    """A copy of `base` (a GPT-2, GPT-NeoX or Llama causal language model, a path or a hub id) with `method` instead.

    The base's own encoding is removed first: GPT-2's position table, the rotary turning of GPT-NeoX and Llama. With
    method "rope" their rotary base, share and scaling are kept unless `rope_parameters` says otherwise. `options` are
    `pe_options`; math_adaptive needs the `tokenizer`. Type, device and training mode are the base's; what is new is
    drawn from PyTorch's global generator.

    Raises ValueError for a base or method that is not known, an unknown option, or math_adaptive without tokenizer.
    """
    options = complete_options(method, options)
    if method == "math_adaptive" and tokenizer is None:
        raise ValueError("math_adaptive reads brackets and operators from decoded tokens: give graft(..., tokenizer=)")
    model = base if isinstance(base, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(base)
    config_class, model_class = _kind(model)
    table: torch.nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    options = with_amplitude(method, options, measured_amplitude(table.weight))
    fields = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    if rope_parameters is not None:
        fields["rope_parameters"] = rope_parameters
    config = config_class(**fields, pe_method=method, pe_options=options)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        grafted = model_class(config)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    missing, unexpected = grafted.load_state_dict(state, strict=False, assign=True)
    lost = [name for name in missing if not name.startswith("encoding.")]
    if lost or set(unexpected) - REMOVED:
        raise ValueError(f"{type(model).__name__} has other weights than expected: {lost + sorted(unexpected)}")
    grafted.tie_weights()
    encoding = make_encoding(config)
    for module in encoding.modules():
        grafted._init_weights(module)
    grafted.install(encoding.to(device=model.device, dtype=model.dtype))
    if tokenizer is not None:
        grafted.read_tokenizer(tokenizer)
    if model.generation_config is not None:
        grafted.generation_config = model.generation_config
    return grafted.train(model.training)


def _kind(model: PreTrainedModel) -> tuple[Any, type[Grafted]]:
    kind = model.config.model_type
    if kind not in BASES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"graft knows causal language models of the types {', '.join(BASES)}, not {type(model).__name__} ({kind})"
        )
    if getattr(model, "quantization_method", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("graft the plain model first, then quantise it or add adapters")
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError("graft knows decoders without cross-attention only")
    return BASES[kind]
