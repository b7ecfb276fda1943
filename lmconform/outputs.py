"""What forward() gave back, read: logits, cache, loss and hidden states, whatever they came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CACHE = ("past_key_values", "cache_params", "state", "past", "cache", "kv_cache", "kv_caches", "layer_past", "mems")


class ConventionError(Exception):
    """No way of calling the model gave logits; the text shows what was tried and the adapter that settles it.

    `tried` has one line for each way, with what came of it.
    """

    def __init__(self, text: str, tried: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.tried = tuple(tried)


@dataclass
class Output:
    """What one forward gave. `logits`: [batch, time, vocab]; `hidden_states`: one [batch, time, width] a layer.

    `beside`: tensors of no known meaning, as a value head gives them.
    """

    logits: Tensor
    cache: Any = None
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    beside: tuple[Tensor, ...] = ()


def read(raw: Any, cache_name: str | None = None) -> Output:
    """Find logits, cache, loss and hidden states in whatever forward() returned.

    Raises ConventionError where there are no logits.
    """
    import torch

    if isinstance(raw, torch.Tensor):
        return Output(raw)
    named = _named(raw)
    if named is not None:
        if named.get("logits") is None:
            for other in ("lm_logits", "prediction_logits", "output", "prediction_scores"):
                if isinstance(named.get(other), torch.Tensor):
                    named["logits"] = named[other]
                    break
            else:
                if "last_hidden_state" in named:
                    raise ConventionError(
                        "returned last_hidden_state and no logits: this is a model without its language-modelling "
                        "head; load it with AutoModelForCausalLM"
                    )
                raise ConventionError(f"returned {type(raw).__name__} with {', '.join(named) or 'nothing'}, no logits")
        cache = next((named[n] for n in (cache_name, *CACHE) if n and named.get(n) is not None), None)
        known = ("logits", "loss", "hidden_states", "attentions", cache_name, *CACHE)
        unknown = [value for name, value in named.items() if name not in known and isinstance(value, torch.Tensor)]
        return Output(
            named["logits"],
            cache,
            named.get("loss"),
            named.get("hidden_states"),
            named.get("attentions"),
            tuple(value for value in unknown if value is not named["logits"]),
        )
    if isinstance(raw, tuple | list) and raw:
        tensors = [item for item in raw if isinstance(item, torch.Tensor)]
        logits = next((t for t in tensors if t.dim() == 3 and t.is_floating_point()), None)
        if logits is None:
            logits = next((t for t in tensors if t.dim() == 2 and t.is_floating_point()), None)
        if logits is None:
            raise ConventionError(f"returned {shapes(raw)}: no [batch, time, vocab] tensor among them")
        loss = next((t for t in tensors if t.dim() == 0), None)
        cache = next((item for item in raw if item is not None and not isinstance(item, torch.Tensor)), None)
        if cache is None and cache_name == "state":  # of a recurrence: one tensor
            cache = next((t for t in tensors if t is not logits and t.dim() > 0 and t.is_floating_point()), None)
        read_already = (logits, loss, cache)
        beside = tuple(t for t in tensors if all(t is not known for known in read_already))
        return Output(logits, cache, loss, beside=beside)
    raise ConventionError(f"returned {shapes(raw)}: no logits in it")


def lone_loss(raw: Any) -> Tensor | None:
    """The loss, where forward() returned it and no logits: a scalar, alone or beside what is no tensor, or by name."""
    import torch

    if isinstance(raw, torch.Tensor):
        return raw if raw.dim() == 0 else None
    named = _named(raw) or {}
    values = named.values() or (raw if isinstance(raw, tuple | list) else ())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors or any(tensor.dim() for tensor in tensors):
        return None
    return named.get("loss", tensors[0])


def _named(raw: Any) -> dict[str, Any] | None:
    if isinstance(raw, Mapping):
        return dict(raw)
    if is_dataclass(raw) and not isinstance(raw, type):
        return {f.name: getattr(raw, f.name) for f in fields(raw)}
    if isinstance(raw, tuple) and hasattr(raw, "_asdict"):
        return dict(raw._asdict())
    if hasattr(raw, "logits"):
        names = ("logits", "loss", "hidden_states", "attentions", *CACHE)
        return {name: getattr(raw, name, None) for name in names}
    return None


def shapes(raw: Any) -> str:
    """'Tensor[2, 5, 99]', '(Tensor[2, 5, 99], None)', 'str': what forward() returned, for messages."""
    import torch

    if isinstance(raw, torch.Tensor):
        return f"Tensor{list(raw.shape)} of {str(raw.dtype).removeprefix('torch.')}"
    if isinstance(raw, tuple | list):
        return "(" + ", ".join(shapes(item) for item in raw[:6]) + (", ..." if len(raw) > 6 else "") + ")"
    if isinstance(raw, Mapping):
        return "{" + ", ".join(f"{key}: {shapes(value)}" for key, value in list(raw.items())[:6]) + "}"
    return "None" if raw is None else type(raw).__name__


def expect_logits(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits, if they are [batch, time, vocab]. Raises ConventionError that names what is off."""
    batch, time = input_ids.shape
    shape = list(logits.shape)
    if not logits.is_floating_point():
        raise ConventionError(f"returned {shapes(logits)}: not floating, so not logits")
    if len(shape) == 3 and shape[:2] == [batch, time]:
        return logits
    if len(shape) == 3 and shape[:2] == [time, batch] and time != batch:
        raise ConventionError(f"returned {shape}: time comes first; lmconform wants [batch, time, vocab]")
    if len(shape) == 3 and shape[:2] == [batch, 1]:
        raise ConventionError(f"returned {shape}: logits of the last position only")
    raise ConventionError(f"returned {shape}, expected [{batch}, {time}, vocab]")
