"""Of what kind a block is, and what reach the config states for it. Nothing is registered here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lmconform.specimen import Specimen

PER_LAYER = ("layer_types", "layers_block_type", "block_types", "attention_layers", "attn_layers")
SUBSET = (
    "index_topk", "indexer_budget", "index_topk_blocks", "compress_rates", "keep_window_size",
    "lsh_attn_chunk_length",
)  # fmt: skip
WINDOWED = ("sliding_attention", "sliding", "local_attention", "local")
FULL = ("full_attention", "global_attention", "global", "attention")


def states(config: Any, name: str) -> bool:
    return bool(getattr(config, name, None))


def one_of_each_kind(config: Any, stack: list[nn.Module]) -> list[int]:
    """The first block of every kind, stated by the config or seen by what a block is made of.

    Some architectures give positions to one kind only, and a convolution has none.
    """
    kinds: list[tuple[Any, ...]] = [tuple(type(part) for part in block.modules()) for block in stack]
    for name in (*PER_LAYER, "no_rope_layers", "layer_rope_theta"):
        stated = getattr(config, name, None)
        if isinstance(stated, list | tuple) and len(stated) >= len(stack):
            kinds = [(*kind, str(value)) for kind, value in zip(kinds, stated, strict=False)]
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def stated_window(subject: Specimen, index: int, layers: int) -> int | str | None:
    """What the config states for this block: a window, None for all earlier tokens, or why it cannot be told."""
    config = subject.config
    for name in SUBSET:
        if states(config, name):
            return f"attends to a chosen part of the tokens ({name})"
    for name in PER_LAYER:
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) >= layers and all(isinstance(k, str) for k in kinds):
            kind = str(kinds[index])
            if kind in WINDOWED:
                return subject.window or f"is of kind {kind!r}, and no window is stated"
            if kind in FULL:
                return None
            return f"is of kind {kind!r}, which states no reach"
    return subject.window
