"""nn.MultiheadAttention opened to function modes."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode


def call_through(mode: TorchFunctionMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), for the __torch_function__ of `mode`; it also sees F.multi_head_attention_forward inside.

    A mode is left while a function that it was told of runs, and that one is Python: its softmax and
    scaled_dot_product_attention go unseen. The fused kernels of eval mode need no such care: torch's own layers keep
    off them within any function mode.
    """
    from torch.nn import functional as F

    own = getattr(func, "__globals__", None) is vars(F)  # not one that a model has put in its place
    if func is not F.multi_head_attention_forward or not own:
        return func(*args, **kwargs)
    # within the mode the function would hand itself to the mode again, for ever: here it finds nobody to hand it to
    known = {**func.__globals__, "has_torch_function": lambda tensors: False}
    body = FunctionType(func.__code__, known, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    with mode:
        return body(*args, **kwargs)
