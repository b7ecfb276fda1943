"""What a model that gave no logits is told: what was seen of it, and the adapter to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmconform.outputs import lone_loss, read

if TYPE_CHECKING:
    from torch import Tensor, nn

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)  # chunks and blocks are powers of two
ADAPTER = """\
import lmconform, {module}{and_torch}

# input_ids: int64 [batch, time]. Inputs that call() names are checked, others are not: attention_mask [batch, time] of
# 1 and 0, position_ids, past_key_values and use_cache (the cache comes back beside the logits), inputs_embeds, labels
def call(model, input_ids):
    # what it returns must be logits: [batch, time, vocab]
    return {body}

subject = lmconform.Subject({module}.build, call=call)      # then: lmconform check this_file.py:subject"""


def advice(module: nn.Module, input_ids: Tensor, names: Sequence[str], labels: str | None, where: str) -> str:
    """What a few more calls showed, and the adapter that settles it.

    `names`: what forward() requires beside the ids; `labels`: its name for them; `where`: the builder's module.
    """
    import torch

    with torch.no_grad():
        seen, body = (
            _of_one_sequence(module, input_ids, labels)
            or _of_more_tokens(module, input_ids)
            or _of_lengths(module, input_ids, labels)
            or _of_what_is_required(names)
        )
    return (
        seen
        + "Say it once in an adapter:\n\n"
        + ADAPTER.format(module=where, body=body, and_torch=", torch" if "torch." in body else "")
    )


def _of_one_sequence(module: nn.Module, input_ids: Tensor, labels: str | None) -> tuple[str, str] | None:
    for ids in (input_ids, input_ids[0]):
        try:
            raw = module(ids, **({labels: ids} if labels else {}))
            if lone_loss(raw) is not None:
                remedy = f"let forward() return them where {labels} is None" if labels else "hand over the model inside"
                when = f"With {labels} it" if labels else "It"
                seen = f"{when} gives the loss and no logits, which are what is compared: {remedy}.\n"
                return seen, "model(input_ids)"
            if ids.dim() == 1 and read(raw).logits.shape[:-1] == ids.shape:
                return "It takes one sequence [time] at a time.\n", "torch.stack([model(row) for row in input_ids])"
        except Exception:
            continue
    return None


def _of_more_tokens(module: nn.Module, input_ids: Tensor) -> tuple[str, str] | None:
    """For a model that puts tokens of its own before the text, as prompt tuning does, and gives their logits too."""
    more = set()
    for ids in (input_ids, input_ids.repeat(1, 2)):
        try:
            raw = module(ids)
            logits = read(raw).logits
        except Exception:
            return None
        if logits.dim() != 3 or logits.shape[0] != ids.shape[0]:
            return None
        more.add(logits.shape[1] - ids.shape[1])
    if len(more) != 1 or (count := more.pop()) <= 0:
        return None
    return (
        f"It gives the logits of {count} tokens more than it was given, whatever the length: those of its own, before "
        "the text, are cut off.\n",
        f"model(input_ids){_where_logits_stand(raw)}[:, {count}:]",
    )


def _of_lengths(module: nn.Module, input_ids: Tensor, labels: str | None) -> tuple[str, str] | None:
    """For a model that takes whole chunks or blocks of tokens alone."""

    def logits(length: int) -> Any:
        """Whatever forward() gave, None where it gave no logits of that length."""
        ids = input_ids[:1, :1].expand(1, length).contiguous()
        for given in ({}, {labels: ids}) if labels else ({},):
            try:
                raw = module(ids, **given)
                if read(raw).logits.shape[:2] == ids.shape:
                    return raw
            except Exception:
                continue
        return None

    chunk = next((length for length in LENGTHS if logits(length) is not None), None)
    if chunk is None or logits(chunk - 1) is not None or logits(chunk + 1) is not None:
        return None
    logits_of = _where_logits_stand(logits(chunk))
    more = logits(2 * chunk) is not None
    taken, filled = (
        (f"{chunk} and {2 * chunk} tokens", "-input_ids.shape[1] %")
        if more
        else (f"{chunk} tokens", "-input_ids.shape[1] +")
    )
    return (
        f"It takes {taken}, not {input_ids.shape[1]}, {chunk - 1} or {chunk + 1}: pad at the end, where a causal model "
        "does not look, and cut that off again.\n",
        f"model(torch.nn.functional.pad(input_ids, (0, {filled} {chunk}))){logits_of}[:, : input_ids.shape[1]]",
    )


def _where_logits_stand(raw: Any) -> str:
    """'', '.logits' or '[1]': how to get at the logits in what forward() gave."""
    import torch

    if isinstance(raw, torch.Tensor):
        return ""
    if hasattr(raw, "logits"):
        return ".logits"
    keys = raw.keys() if hasattr(raw, "keys") else range(len(raw))
    wanted = read(raw).logits
    return next(f"[{key!r}]" for key in keys if raw[key] is wanted)


def _of_what_is_required(names: Sequence[str]) -> tuple[str, str]:
    if not names:
        return "", "model(input_ids)"
    given = ", ".join(f"{name}=..." for name in names)
    return f"forward() requires {' and '.join(names)}: say what is right.\n", f"model(input_ids, {given})"
