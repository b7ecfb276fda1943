"""What generate() hands to forward(), call by call, and what came back: recorded, not guessed from the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import outputs
from lmconform.measuring.traces import hooked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen


@dataclass
class Call:
    """One call of forward(): tokens [batch, time], mask and positions as given, logits [batch, vocab] at the end.

    `cached`: whether a cache was handed over, or an object that must be one; None where a tensor or a number may say
    that there is one (a state, the place to go on from).
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    cached: bool | None
    logits: Tensor


@contextmanager
def calls_recorded(subject: Specimen) -> Iterator[list[Call]]:
    """Within it, every call of the subject's module that can be read; a generate() that calls only parts has none."""
    import torch

    convention, module = subject.convention, subject.module
    signature = inspect.signature(module.forward)
    first = next(iter(signature.parameters), None)
    made: list[Call] = []

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            given = dict(signature.bind_partial(*args, **kwargs).arguments)
            logits = outputs.read(output, convention.cache).logits
        except (TypeError, outputs.ConventionError):
            return
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name, {}))
        ids = given.pop(convention.ids or first or "", None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or logits.dim() != 3:
            return
        mask, positions = (given.pop(name, None) if name else None for name in (convention.mask, convention.positions))
        rest = [value for value in given.values() if value is not None and not isinstance(value, bool | str)]
        cached = True if any(not isinstance(value, int | float | torch.Tensor) for value in rest) else None
        cached = cached if rest else False
        made.append(Call(ids.clone(), _copied(mask), _copied(positions), cached, logits[:, -1].detach().clone()))

    with hooked(module.register_forward_hook(note, with_kwargs=True)):
        yield made


def _copied(value: Any) -> Tensor | None:
    import torch

    return value.detach().clone() if isinstance(value, torch.Tensor) else None


def unlike_plain_calls(subject: Specimen, calls: list[Call], prompt: Tensor, made: Tensor) -> str | None:
    """How a call differs from what a plain loop over `prompt` [batch, time] would hand over; "" where none does.

    Each must get all tokens so far, or with a cache those that no call has had yet, at the positions where they stand
    and with nothing masked. None where that cannot be told: no call was seen, or as many as steps were not.
    """
    import torch

    if len(calls) < made.shape[1]:
        return None
    had = 0
    for step, call in enumerate(calls[: made.shape[1]]):
        seen = torch.cat([prompt, made[:, :step].to(prompt)], dim=1)
        batch, time = seen.shape
        if call.ids.shape[0] != batch:
            return None
        new = call.cached or (call.cached is None and call.ids.shape[1] < time)
        rest = seen[:, had:] if new else seen
        if call.ids.shape != rest.shape or not torch.equal(call.ids.to(seen), rest):
            wanted = "those that are not in its cache yet" if new and had else "all so far"
            return f"in step {step} forward() is given {_few(call.ids[0])}, and not {wanted}: {_few(rest[0])}"
        places = torch.arange(time - rest.shape[1], time, device=seen.device) + subject.first_position
        placed = call.positions if call.positions is not None and call.positions.shape[-1:] == places.shape else places
        if bool((placed != places).any()):
            got = _few(placed.reshape(-1, len(places))[0])
            return f"in step {step} forward() is given positions {got}, where the tokens stand at {_few(places)}"
        if call.mask is not None and call.mask.dim() == 2 and not bool(call.mask.bool().all()):
            return f"in step {step} forward() is given a mask with zeros, though nothing is padded"
        had = time
    return ""


def _few(tokens: Tensor) -> str:
    shown = tokens.tolist()
    return str(shown) if len(shown) <= 6 else f"{shown[:2]} ... {shown[-2:]} ({len(shown)} of them)"
