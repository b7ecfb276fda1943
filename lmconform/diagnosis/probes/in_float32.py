"""Some calls of a half model computed in float32, the others as they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING, Any

from lmconform.measuring.lines import called, own_frame
from lmconform.measuring.multihead import call_through

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CASTS = {"half", "bfloat16"}


@dataclass(frozen=True)
class Site:
    """An instruction of the model's own code that calls torch: a line may have several, a module's call is one."""

    code: CodeType
    instruction: int


@dataclass
class Sites:
    """Where numbers of a half type go in or come out in one forward, in the order in which that is first met."""

    dtype: torch.dtype
    calls: dict[Site, str] = field(default_factory=dict)  # the first call at each: Tensor.cumsum (model.py:9)
    half: dict[tuple[Site, str], list[frozenset[int]]] = field(default_factory=dict)  # which results, call by call
    watched: Site | None = None
    seen: list[Tensor] = field(default_factory=list)  # the floating numbers that the watched one gave


@contextmanager
def noted(sites: Sites) -> Iterator[None]:
    """Within, the model runs as ever, and its calls with numbers of that type are noted."""
    from torch.overrides import TorchFunctionMode

    from lmconform.simulated.tracking import tensors_in

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = call_through(self, func, args, kwargs)
            name = getattr(func, "__name__", "")
            frame = own_frame(__file__)
            if name == "__get__" or frame is None:
                return result
            made = list(tensors_in(args[:1] if name == "__setitem__" else result))
            half = frozenset(place for place, tensor in enumerate(made) if tensor.dtype == sites.dtype)
            site = Site(frame.f_code, frame.f_lasti)
            sites.half.setdefault((site, name), []).append(half)
            if half or any(tensor.dtype == sites.dtype for tensor in tensors_in((args, kwargs))):
                sites.calls.setdefault(site, called(func, frame))
            if site == sites.watched:
                sites.seen += [tensor.detach().clone() for tensor in made if tensor.is_floating_point()]
            return result

    with Noting():
        yield


@contextmanager
def in_float32(chosen: range, sites: Sites) -> Iterator[None]:
    """Within, the chosen of these sites compute in float32, and what they give stays so until another takes it.

    There "half" means float32, in arguments as in the types asked for. What other sites take is cast back first. A
    half tensor that is written into in place gets the result rounded, and the chosen sites go on with the unrounded.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils.weak import WeakTensorKeyDictionary

    from lmconform.simulated.tracking import tensors_in

    dtype = sites.dtype
    order = {site: place for place, site in enumerate(sites.calls)}
    following = defaultdict(lambda: iter(()), {call: iter(made) for call, made in sites.half.items()})
    wide = WeakTensorKeyDictionary()  # to True: would be half
    unrounded = WeakTensorKeyDictionary()  # of a half tensor: its version, and what it holds in float32

    def is_wide(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value in wide

    def widened(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == dtype:
            version, exact = unrounded.get(value, (None, None))
            return exact if exact is not None and value._version == version else value.float()
        return torch.float32 if value is dtype else value

    def narrowed(value: Any) -> Any:
        return value.to(dtype) if is_wide(value) else value

    def computed(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        args, kwargs = _mapped(widened, args), _mapped(widened, kwargs)
        return call_through(mode, torch.Tensor.float if name in CASTS else func, args, kwargs)

    class InFloat32(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name == "__get__":  # x.dtype, x.shape, x.mT
                made = func(*args)
                if isinstance(made, torch.Tensor) and is_wide(args[0]):
                    wide[made] = True
                return dtype if isinstance(made, torch.dtype) and is_wide(args[0]) else made
            frame = own_frame(__file__)
            if frame is None:  # who looks at the model, say
                return call_through(self, func, args, kwargs)
            site = Site(frame.f_code, frame.f_lasti)
            here = order.get(site, -1) in chosen
            half = next(following[site, name], frozenset())
            into = args[0] if args and _in_place(name) and isinstance(args[0], torch.Tensor) else None
            if into is not None and (is_wide(into) or (here and into.dtype == dtype)):
                exact = into if is_wide(into) else widened(into).clone()
                made = computed(self, func, (exact, *args[1:]), kwargs)
                if exact is into:
                    if not here:
                        into.copy_(into.to(dtype))
                    return made
                into.copy_(exact)
                unrounded[into] = into._version, exact
                wide[exact] = True
                return made
            if not here or "out" in kwargs:
                return call_through(self, func, _mapped(narrowed, args), _mapped(narrowed, kwargs))
            made = computed(self, func, args, kwargs)
            if isinstance(made, torch.Tensor) and any(made is each for each in args):
                made = made.view_as(made)  # x.float() gives x itself, which may be wide where this is not
            for place, tensor in enumerate(tensors_in(made)):
                if place in half and tensor.dtype == torch.float32:
                    wide[tensor] = True
            return made

    with InFloat32():
        yield


def _in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))  # x += y is Tensor.add_


def _mapped(change: Any, value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, each) for each in value)
    if type(value) is dict:
        return {key: _mapped(change, each) for key, each in value.items()}
    return change(value)
