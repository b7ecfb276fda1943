"""Float masks in the query's type, for float64 copies of models that make their mask in float32.

scaled_dot_product_attention on the CPU takes a float32 mask beside float64 queries and gives wrong numbers, silently
(seen in torch 2.11 to 2.13). A float64 copy is evidence about the model, so it must not fall into that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

MASKS = ("attn_mask", "key_padding_mask")


def masks_in_the_querys_type() -> AbstractContextManager[Any]:
    """Within, attention functions of torch get their float masks in the type of the queries."""
    from torch import Tensor
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    attend = functional.scaled_dot_product_attention
    takes_masks = (attend, functional.multi_head_attention_forward)

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in takes_masks:
                query = args[0] if args else kwargs["query"]

                def fit(mask: Any) -> Any:
                    other = isinstance(mask, Tensor) and mask.is_floating_point() and mask.dtype != query.dtype
                    return mask.to(query.dtype) if other else mask

                kwargs = {name: fit(value) if name in MASKS else value for name, value in kwargs.items()}
                if func is attend and len(args) > 3:
                    args = (*args[:3], fit(args[3]), *args[4:])
            return func(*args, **kwargs)

    return Mode()
