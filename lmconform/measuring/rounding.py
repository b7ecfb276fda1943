"""What a half type costs: a copy in that type, its float64 counterpart, and the drift that rounding alone explains.

Nothing is registered here. The counterpart holds the same, already rounded weights, so that only the computing differs.
Rounding noise is measured on it: every submodule's output is rounded to the type, in a few slightly different ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmconform.copies import convert
from lmconform.measuring.running import followed
from lmconform.measuring.traces import hooked

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

SAMPLES = 3  # of the rounding noise


def in_type(subject: Specimen, dtype: torch.dtype) -> Specimen:
    """A copy in that type, but for what transformers' loader keeps in float32 because the class says so."""
    import torch

    module = subject.copy().module
    kept: dict[str, Any] = {}
    if (wide := kept_in_float32(module, dtype)) is not None:
        tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
        kept = {name: tensor.detach() for name, tensor in tensors if wide.search(name) and tensor.is_floating_point()}
    module = convert(module, dtype)
    for name, tensor in kept.items():
        holder, _, attribute = name.rpartition(".")
        getattr(module.get_submodule(holder), attribute).data = tensor.to(torch.float32)
    copied = subject._derive(module)
    _any_experts(copied.module)
    return copied


def kept_in_float32(module: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """The names that transformers leaves in float32 when it loads in `dtype`; None where there are none."""
    import torch

    if dtype not in (torch.float16, torch.bfloat16):
        return None
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names |= set(getattr(part, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:$|\.)" for name in sorted(names))) if names else None


def _any_experts(module: nn.Module) -> None:
    """transformers' grouped kernels take not every type."""
    set_experts = getattr(module, "set_experts_implementation", None)
    if callable(set_experts):
        set_experts("eager")


# -- what the modules give ---------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One submodule's call: the types of what it was given and gives, and whether these were finite numbers."""

    name: str
    kind: str
    dtypes: tuple[torch.dtype, ...]
    entered_in: tuple[torch.dtype, ...]
    finite: bool
    entered_finite: bool


@dataclass
class Trace:
    """The calls of one forward in the order in which they end; `place` is where it raised."""

    steps: list[Step] = field(default_factory=list)
    place: str = ""

    def first_outside(self, dtype: torch.dtype) -> Step | None:
        """The first module that was given that type, or no floating tensor, and gives another."""
        for step in self.steps:
            if any(made != dtype for made in step.dtypes) and all(given == dtype for given in step.entered_in):
                return step
        return None

    def outside(self, dtype: torch.dtype) -> frozenset[str]:
        """The names of the modules that give another type."""
        return frozenset(step.name for step in self.steps if any(made != dtype for made in step.dtypes))

    def first_infinite(self) -> Step | None:
        """The first module that was given finite numbers and gives others."""
        return next((step for step in self.steps if step.entered_finite and not step.finite), None)


@contextmanager
def traced(module: nn.Module) -> Iterator[Trace]:
    """Within, every submodule's calls are noted."""
    trace = Trace()

    def watch(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = list(floating([args, kwargs])), list(floating(output))
            trace.steps.append(
                Step(
                    name,
                    type(part).__name__,
                    tuple(tensor.dtype for tensor in made),
                    tuple(tensor.dtype for tensor in given),
                    all(_tame(tensor) for tensor in made),
                    all(_tame(tensor) for tensor in given),
                )
            )

        return hook

    named = list(module.named_modules())
    with (
        followed(module) as running,
        hooked(*(part.register_forward_hook(watch(name), with_kwargs=True) for name, part in named)),
    ):
        try:
            yield trace
        except Exception:
            trace.place = running.place
            raise


def _tame(tensor: Tensor) -> bool:
    """No NaN, and no infinity but the -inf of a mask."""
    import torch

    return bool((tensor.isfinite() | (tensor == -torch.inf)).all())


def floating(value: Any) -> Iterator[Tensor]:
    """The floating tensors within tuples, lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from floating(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from floating(item)


# -- noise -------------------------------------------------------------------------------------------------------------


def rounded(
    exact: Specimen, dtype: torch.dtype, left: frozenset[str], seed: int, run: Callable[[Specimen], Tensor]
) -> Tensor:
    """`run(exact)`, every submodule's output rounded to `dtype` on the way, but for the modules named in `left`.

    Under seeds above 0 a number is moved by up to a unit in the last place before it is rounded.
    """
    import torch

    eps = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(seed)

    def coarse(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if seed:
                wobble = torch.rand(value.shape, generator=generator).to(value) - 0.5
                value = value * (1 + eps * wobble)
            return value.to(dtype).to(value.dtype)
        if type(value) in (tuple, list):
            return type(value)(coarse(item) for item in value)
        return value

    def hook(part: nn.Module, args: Any, output: Any) -> Any:
        return coarse(output)

    parts = [part for name, part in exact.module.named_modules() if name and name not in left]
    with hooked(*(part.register_forward_hook(hook) for part in parts)):
        return run(exact)


# -- routing -----------------------------------------------------------------------------------------------------------


class Choices:
    """Which entries were the largest: chosen once, in float64, and replayed in every other run.

    A router's top-k is a jump: two experts that are nearly equal change places by rounding, and nothing is wrong.
    """

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.replayed = 0

    def mode(self, replay: bool) -> Any:
        """A context in which choices among floating numbers are noted, or replayed in the same order."""
        import torch
        from torch.overrides import TorchFunctionMode

        tops = {torch.topk: "topk", torch.Tensor.topk: "topk", torch.sort: "sort", torch.Tensor.sort: "sort"}
        tops |= {torch.max: "max", torch.Tensor.max: "max"}  # with dim: sparse mixers take the largest again and again
        bare = {torch.argmax, torch.Tensor.argmax, torch.argsort, torch.Tensor.argsort}
        choices = self
        waiting = iter(self.made)

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func not in tops and func not in bare:
                    return result
                given = kwargs or {}
                values = args[0] if args else given["input"]
                if not values.is_floating_point() or (tops.get(func) == "max" and isinstance(result, torch.Tensor)):
                    return result
                indices = result if func in bare else result[1]
                if not replay:
                    choices.made.append(indices)
                    return result
                known = next(waiting, None)
                if known is None or known.shape != indices.shape:
                    return result
                choices.replayed += 1
                if func in bare:
                    return known
                place = 2 if tops[func] == "topk" else 1
                axis = given.get("dim", args[place] if len(args) > place and isinstance(args[place], int) else -1)
                if known.dim() < values.dim():  # max without keepdim
                    taken = values.gather(axis, known.unsqueeze(axis)).squeeze(axis)
                else:
                    taken = values.gather(axis, known)
                return getattr(torch.return_types, tops[func])((taken, known))

        return Mode()
