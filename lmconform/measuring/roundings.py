"""Where a forward rounds what it has learnt: there are steps there, and no derivative."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform.measuring.lines import called, own_frame
from lmconform.measuring.multihead import call_through

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

ROUNDS = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "floor_divide", "__floordiv__")
QUANTISES = ("fake_quantize", "_fake_quantize", "fused_moving_avg_obs_fake_quant")
CASTS = ("to", "type", "int", "long", "short", "char", "byte")  # to whole numbers


def rounding_in(subject: Specimen, ids: Tensor) -> str:
    """The first place, Tensor.round (model.py:9); empty where forward() rounds nothing that its weights have made.

    Also under no_grad(), and inside an autograd.Function: what the weights have made is followed from call to call.
    Whole numbers that come of it (an expert chosen, a comparison) are not followed: those are choices.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils.weak import WeakIdKeyDictionary

    from lmconform.simulated.tracking import tensors_in

    made: Any = WeakIdKeyDictionary()
    weights = {id(parameter) for parameter in subject.module.parameters()}
    found: list[str] = []

    def learnt(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and (id(tensor) in weights or tensor in made or tensor.requires_grad)

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = call_through(self, func, args, kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                if not any(learnt(tensor) for tensor in tensors_in((args, kwargs))):
                    return result
                given = list(tensors_in(result))
                for tensor in given:
                    if tensor.is_floating_point():
                        made[tensor] = True
                written = getattr(func, "__name__", "")
                name = written if written.endswith("__") else written.rstrip("_")  # round_() rounds as well
                of_it = bool(args) and isinstance(args[0], torch.Tensor) and learnt(args[0])
                whole = any(not tensor.is_floating_point() and tensor.dtype != torch.bool for tensor in given)
                if name.startswith(QUANTISES) or (of_it and (name in ROUNDS or (whole and name in CASTS))):
                    found.append(called(func, own_frame(__file__)))
            return result

    with Watching():
        subject.logits(ids, grad=True)
    return found[0] if found else ""
