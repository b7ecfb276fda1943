"""What can be read off a module's structure: blocks, embedding, stated sizes. Nothing here runs the model."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import nn

CONTEXT = (
    "max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len", "max_seq_length", "context_length",
    "max_len", "max_length", "seq_len", "ctx_len", "max_target_positions",
)  # fmt: skip
WINDOW = ("sliding_window", "attention_window", "window_size", "local_attention")
OTHER_SENSE = re.compile(r"vision|visual|image|img_|audio|speech", re.IGNORECASE)
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "decoder_start_token_id", "mask_token_id")


def config_of(module: nn.Module) -> Any | None:
    """The model's config object (or dict), the text part of a composite one; None where it has none."""
    config = getattr(module, "config", None)
    if config is None:
        config = getattr(module, "cfg", None)
    get_text = getattr(config, "get_text_config", None)
    if callable(get_text):
        try:
            return get_text(decoder=True)
        except (TypeError, ValueError):
            return config
    return config


def stated(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first whole number that the config, else the module itself, states under one of these names."""
    config = config_of(module)
    for holder in (config, module):
        for name in names:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def context_length(module: nn.Module) -> int | None:
    """The stated number of positions, None where none is stated.

    A position table with a padding row (RoBERTa) starts behind it: those rows are no context.
    """
    from torch import nn

    rows = stated(module, CONTEXT)
    if rows is None:
        return None
    for name, part in module.named_modules():
        table = isinstance(part, nn.Embedding) and "position" in name and part.num_embeddings <= rows + 2
        if table and part.padding_idx is not None:
            return min(rows, int(part.num_embeddings) - part.padding_idx - 1)
    return rows


def window(module: nn.Module) -> int | None:
    """The stated sliding window in tokens, None where there is none or it is switched off."""
    config = config_of(module)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return stated(module, WINDOW)


def special_ids(module: nn.Module) -> dict[str, int]:
    """Special token ids by name, from config and generation config."""
    found: dict[str, int] = {}
    for holder in (config_of(module), getattr(module, "generation_config", None)):
        for name in SPECIAL:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                found.setdefault(name, value)
    return found


def blocks(module: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential] | None:
    """Name and list of the repeated blocks (layers): the ModuleList that holds the most parameters.

    An nn.Sequential counts where it holds two or more composite modules of one class. Where there is neither, a list
    of lists counts (`for norm, attend, add in self.layers`, as in x-transformers): each inner list is a block that is
    never called itself, see `called`. A tower that reads images or sound counts only where there is nothing else: no
    token runs through it.
    """
    from torch import nn

    full = {
        name: part
        for name, part in module.named_modules()
        if (isinstance(part, nn.ModuleList) or _of_equals(part))
        and len(part) > 0
        and not any(child is None or isinstance(child, nn.Embedding) for child in part)
    }
    nested = [name for name, part in full.items() if any(isinstance(child, nn.ModuleList) for child in part)]
    unlike = [name for name, part in full.items() if len({type(child) for child in part}) > 1]  # one layer's parts
    lists = [
        (name, part)
        for name, part in full.items()
        if name not in nested and not (name in unlike and name.rpartition(".")[0] in nested)
    ]
    if not lists:
        lists = [(name, full[name]) for name in nested if all(called(child) for child in full[name])]
    beside = Counter((name.rpartition(".")[0], len(part)) for name, part in lists)
    # three lists of one length side by side (XLM: attentions, norms, ffns) are one layer's parts, not layers
    lists = [(name, part) for name, part in lists if beside[name.rpartition(".")[0], len(part)] < 3]
    if not lists:
        return None
    return max(lists, key=lambda item: (not OTHER_SENSE.search(item[0]), _size(item[1]), -len(item[0])))


def called(block: nn.Module) -> list[nn.Module]:
    """The modules whose calls make up a call of `block`: itself, or, where it is a list, what it lists.

    In the order of the list, which need not be that of the calls.
    """
    from torch import nn

    if type(block).forward is not nn.Module.forward:
        return [block]
    return [part for child in block.children() for part in called(child)]


def _of_equals(part: nn.Module) -> TypeGuard[nn.Sequential]:
    from torch import nn

    return (
        isinstance(part, nn.Sequential)
        and len(part) > 1
        and len({type(child) for child in part}) == 1
        and all(any(True for _ in child.children()) for child in part)
        and list(part._modules) == [str(index) for index in range(len(part))]  # an index is the name of a block
    )


def embedding(module: nn.Module, vocab_size: int) -> nn.Module | None:
    """The token embedding: get_input_embeddings() where there is one, else the nn.Embedding of `vocab_size` rows."""
    from torch import nn

    getter = getattr(module, "get_input_embeddings", None)
    if callable(getter):
        try:
            found = getter()
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Module) and not isinstance(
            found, nn.ModuleList
        ):  # one table a codebook: no ids to embed
            return found
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    exact = [table for table in tables if table.num_embeddings == vocab_size]
    larger = [table for table in tables if table.num_embeddings > vocab_size]  # padded for speed
    return next(iter(exact or larger), None)


def head(module: nn.Module, vocab_size: int) -> nn.Module | None:
    """The output projection to the vocabulary, None where it cannot be told."""
    from torch import nn

    getter = getattr(module, "get_output_embeddings", None)
    if callable(getter):
        found = getter()
        if isinstance(found, nn.Module):
            return found
    heads = [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == vocab_size]
    return heads[-1] if heads else None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
