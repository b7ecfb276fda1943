"""Which submodule is running: the dotted name of the innermost one, also after it has raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmconform.measuring.traces import hooked

if TYPE_CHECKING:
    from torch import nn


class Running:
    """The submodules that have been entered and not left, outermost first."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.kinds: list[str] = []

    @property
    def place(self) -> str:
        """'blocks.1.attention (Attention)'; the model's class where no submodule runs."""
        if not self.names:
            return "no module"
        return f"{self.names[-1]} ({self.kinds[-1]})" if self.names[-1] else self.kinds[-1]


@contextmanager
def followed(module: nn.Module) -> Iterator[Running]:
    """Within, what runs of `module` is known. A forward that raises leaves its modules entered."""
    running = Running()

    def enters(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
            if not name:
                running.names.clear()
                running.kinds.clear()
            running.names.append(name)
            running.kinds.append(type(part).__name__)

        return hook

    def leaves(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.names.pop()
        running.kinds.pop()

    named = list(module.named_modules())
    with (
        hooked(*(part.register_forward_pre_hook(enters(name), prepend=True) for name, part in named)),
        hooked(*(part.register_forward_hook(leaves) for _, part in named)),
    ):
        yield running
