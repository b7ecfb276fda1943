"""Whether a model has attention at all: what no mask can be laid over is no matter of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmconform.measuring.multihead import call_through
from lmconform.measuring.traces import distinct_length, hooked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

SDPA = "scaled_dot_product_attention"
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")


def may_attend(subject: Specimen, parts: Sequence[nn.Module] = (), within_a_window: bool = False) -> bool:
    """Whether the subject, or those of its modules while they run, may have attention.

    False only where all that is made of a text was seen to be made by operations of torch's, and none of them is an
    attention, a softmax over tokens or blocks of them, or has to do with a tensor of [..., time, time]; where it may be
    attention `within_a_window`, nor multiplies two that are made of the text as matrices. A kernel of another library
    hides what it does.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from lmconform.simulated.tracking import tensors_in

    told = distinct_length(subject)
    if told is None:
        return True
    time: int = told
    made: list[Tensor] = []  # kept alive: an id that is free again would be another tensor's
    known: set[int] = set()
    running = [not parts]
    found: list[str] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            with torch._C.DisableTorchFunctionSubclass():  # what looks at tensors is no call of the model's
                given = [each for each in tensors_in((args, kwargs)) if time in each.shape]
                foreign = any(each.is_floating_point() and id(each) not in known for each in given)
            result = call_through(self, func, args, kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                timed = [*given, *(each for each in tensors_in(result) if time in each.shape)]
                made.extend(timed)
                known.update(map(id, timed))
                name = getattr(func, "__name__", "")
                pairwise = any(tuple(each.shape).count(time) > 1 for each in timed)
                weighs = name == SDPA or _weighs_tokens(name, args, kwargs, time)
                product = within_a_window and name in PRODUCTS and sum(t.is_floating_point() for t in given) > 1
                if running[-1] and (foreign or pairwise or weighs or product):
                    found.append(name)
            return result

    def enters(part: nn.Module, args: Any) -> None:
        running.append(True)

    def leaves(part: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with (
        hooked(*(part.register_forward_pre_hook(enters) for part in parts)),
        hooked(*(part.register_forward_hook(leaves, always_call=True) for part in parts)),
        Watching(),
    ):
        try:
            subject.logits(subject.probe_ids(1, time))
        except Exception:  # a model that cannot be watched so closely
            return True
    return bool(found)


def _weighs_tokens(name: str, args: Any, kwargs: Any, time: int) -> bool:
    """A softmax over tokens, or one that may be over a block of them."""
    if name != "softmax":
        return False
    values = args[0] if args else kwargs["input"]
    axis = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
    return values.dim() > 3 or axis is None or values.shape[axis] == time
