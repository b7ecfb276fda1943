"""Tiny, randomly initialised versions of every causal architecture transformers knows.

The generic rule reads a config class, keeps all of its behavioural defaults and replaces only the fields
that carry a size. What the rule cannot know (divisibility constraints, layer kinds that the class defaults
leave out) is data in ``shrinking.toml``, one table per model type.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 99
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
INTERMEDIATE = 112
POSITIONS = 128
WINDOW = 16
EXPERTS = 4
EXPERTS_PER_TOKEN = 2
LAYERS = 2

# Every name under which a config spells a size, by the value it shrinks to. Sizes that could be confused with
# one another get different values, so that a swapped dimension fails instead of broadcasting.
_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCAB, (
        "vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size",
        "unpadded_vocab_size",
    )),
    (HIDDEN, (
        "hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "lru_width",
        "word_embed_proj_dim", "text_hidden_size", "hidden_size_global", "adapter_input_size",
        "adapter_in_dim", "adapter_out_dim", "out_hidden_size", "ext_pw_out_channel",
        "nemo_conv_channels", "output_channels", "audio_embed_dim", "mm_embed_dim",
    )),
    (LAYERS, (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers",
        "encoder_layers", "num_encoder_layers", "num_decoder_layers", "depth", "max_window_layers",
        "conf_num_hidden_layers", "n_layers_per_attn_res_block", "vision_layers",
    )),
    (HEADS, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
        "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads",
        "num_decoder_attention_heads", "swa_num_attention_heads", "linear_num_heads",
        "linear_num_value_heads", "conf_num_attention_heads",
    )),
    (KV_HEADS, (
        "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads",
        "linear_num_key_heads", "num_global_key_value_heads", "num_query_groups",
    )),
    (HEAD_DIM, (
        "head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size", "swa_head_dim",
        "linear_head_dim", "linear_key_head_dim", "global_head_dim", "index_head_dim", "qk_nope_head_dim",
        "v_head_dim", "swa_v_head_dim", "d_kv", "mamba_d_head", "mamba_head_dim",
    )),
    (INTERMEDIATE, (
        "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "n_inner", "dff",
        "dim_ff", "d_ff", "ffn_hidden_size", "feed_forward_size", "dense_intermediate_size",
        "intermediate_size_mlp", "prefix_dense_intermediate_size", "mlp_dim",
    )),
    (48, ("moe_intermediate_size", "expert_ffn_hidden_size", "output_embedding_size")),
    (POSITIONS // 2, ("original_max_position_embeddings",)),
    (40, (
        "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
        "moe_shared_expert_intermediate_size", "embedding_size", "input_embedding_size", "kv_lora_rank",
        "indexer_head_dim",
    )),
    (24, (
        "q_lora_rank", "o_lora_rank", "laurel_rank", "gated_norm_rank", "hc_lowrank",
        "hidden_size_per_layer_input", "linear_value_head_dim", "adapter_rank", "router_hidden_size",
        "query_pre_attn_scalar",
    )),
    (8, (
        "qk_rope_head_dim", "rotary_dim", "dim_model_base", "state_size", "ssm_state_size", "mamba_d_state", "d_rel",
        "mamba_n_heads", "mamba_num_heads", "n_mamba_heads",
    )),
    (5, ("time_step_rank", "mamba_dt_rank")),
    (POSITIONS, (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
        "context_length", "max_target_positions", "max_source_positions", "sequence_length",
    )),
    (WINDOW, (
        "sliding_window", "sliding_window_size", "attention_window_size", "window_size",
        "local_attention", "attention_chunk_size", "keep_window_size", "rel_extent", "block_size",
        "chunk_size", "mamba_chunk_size", "mem_len", "index_topk",
    )),
    (EXPERTS, (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num",
        "index_block_size",
    )),
    (EXPERTS_PER_TOKEN, (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
        "n_group", "num_expert_group", "index_topk_blocks", "n_groups",
    )),
    (1, (
        "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
        "first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers",
    )),
    (32, (
        "image_size", "mm_tokens_per_image", "num_mel_bins",
        "index_n_heads",  # sparse indexers sum rectified scores over their heads: with few, scores tie at 0 exactly
    )),
)  # fmt: skip
_SIZE_OF = {name: size for size, names in _SIZES for name in names}

# Special tokens the class gives an id; a class that leaves one at None keeps None.
_TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "eod_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3,
}  # fmt: skip

# Fields that a class may leave at None although its modelling code needs a number.
_REQUIRED = ("head_dim", "num_key_value_heads")

_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")


class Unshrinkable(Exception):
    """No tiny model of this type can be built or run here; ``reason`` is one sentence."""

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(f"{model_type}: {reason}")
        self.model_type = model_type
        self.reason = reason


class UnknownType(LookupError):
    """The name is no causal model type of the installed transformers; the text suggests the nearest."""

    def __init__(self, model_type: str) -> None:
        near = difflib.get_close_matches(model_type, causal_types(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        super().__init__(f"{model_type!r} is not a causal model type{hint}")
        self.model_type = model_type


def causal_types() -> list[str]:
    """All model types that transformers maps to a causal language model, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of ``model_type`` shrunk to about 64 wide, 2 layers and 99 tokens.

    Composite (vision, audio) types come whole, with every sub-config shrunk. Raises ``UnknownType`` for a
    name that is not in ``causal_types()``, ``Unshrinkable`` where the architecture allows no tiny version.
    """
    if model_type not in causal_types():
        raise UnknownType(model_type)
    entry = _adjustments().get(model_type, {})
    if "unshrinkable" in entry:
        raise Unshrinkable(model_type, entry["unshrinkable"])
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return _shrunk(CONFIG_MAPPING[model_type], entry)
    except Exception as error:
        raise Unshrinkable(model_type, f"its config rejects the shrunk sizes ({_summary(error)}).") from error


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny causal model: float32 on the CPU, eval mode, default attention, weights drawn from ``seed``.

    ``model(input_ids=[B, T]).logits`` is ``[B, T, vocab]``, where vocab is
    ``model.config.get_text_config().vocab_size`` and T at most ``POSITIONS``. The caller's random state is
    left as it was. Raises as ``tiny_config`` does, ``Unshrinkable`` also where the class cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = tiny_config(model_type)
    # Seeding only the default generator leaves accelerator generators alone; torch.manual_seed would not.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            if _is_config(decoder := getattr(config, "decoder", None)):
                # The auto class hands these models the whole composite, of which they read the decoder only.
                model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                model = model_class(decoder).float()
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:
            raise Unshrinkable(model_type, f"its model class cannot be built ({_summary(error)}).") from error
    return model.eval()


@lru_cache(maxsize=1)
def _adjustments() -> dict[str, dict[str, Any]]:
    text = resources.files("lmconform").joinpath("shrinking.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def _shrunk(config_class: type[PreTrainedConfig], entry: dict[str, Any]) -> PreTrainedConfig:
    """Build ``config_class`` with the generic sizes, then with the type's own entry on top."""
    adjusted = {key: value for key, value in entry.items() if key != "why"}
    default = config_class()
    kwargs = _generic(default, adjusted)
    kwargs.update({key: value for key, value in adjusted.items() if not _is_config(_read(default, key))})
    return config_class(**kwargs)


def _generic(default: PreTrainedConfig, adjusted: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(default)}
    kwargs: dict[str, Any] = {}
    for name in sorted(fields | {name for name, value in vars(default).items() if _is_config(value)}):
        value = _read(default, name)
        if _is_config(value):
            kwargs[name] = _shrunk(type(value), adjusted.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in _TOKENS:
                kwargs[name] = _TOKENS[name]
            elif value > 0 and name in _SIZE_OF:
                kwargs[name] = min(value, _SIZE_OF[name])
        elif isinstance(value, list) and name in _TOKENS:
            kwargs[name] = _TOKENS[name]
        elif value is None and name in _REQUIRED:
            kwargs[name] = _SIZE_OF[name]
    if _read(default, "kv_lora_rank") and "num_key_value_heads" in kwargs:
        kwargs["num_key_value_heads"] = HEADS  # latent attention expands its keys to every head
    if "is_decoder" in fields and not default.is_encoder_decoder:
        kwargs["is_decoder"] = True
    kwargs.update(_layer_lists(default, fields, adjusted))
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict):
        kwargs["rope_parameters"] = _shrunk_rope(rope)
    return kwargs


def _read(config: PreTrainedConfig, name: str) -> Any:
    """``config.name``, or the class default of a size that varies over the layers and so has no one value."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return next(field.default for field in dataclasses.fields(config) if field.name == name)


def _layer_lists(default: PreTrainedConfig, names: set[str], adjusted: dict[str, Any]) -> dict[str, Any]:
    """The shortest lists that show every layer kind of the default once, and the layer count they imply."""
    kinds: dict[str, list[str]] = {}
    for name in _LAYER_LISTS:
        values = adjusted.get(name, getattr(default, name, None))
        if name in names and isinstance(values, list) and values:
            kinds[name] = values if name in adjusted else list(dict.fromkeys(values))
    if not kinds:
        return {}
    count = max(LAYERS, *map(len, kinds.values()))
    lists: dict[str, Any] = {name: kind + kind[-1:] * (count - len(kind)) for name, kind in kinds.items()}
    if "num_hidden_layers" in names:
        lists["num_hidden_layers"] = count
    return lists


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The same rotary embedding, with lengths and per-frequency lists cut to the tiny head and context."""
    shrunk: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            shrunk[name] = _shrunk_rope(value)
        elif name == "original_max_position_embeddings":
            shrunk[name] = POSITIONS // 2
        elif name in ("short_factor", "long_factor"):
            shrunk[name] = value[: HEAD_DIM // 2]
        else:
            shrunk[name] = value
    return shrunk


def _is_config(value: object) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)
