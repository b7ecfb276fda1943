"""Running what asks for torch.compile without compiling it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

_WITHIN: ContextVar[bool] = ContextVar("within uncompiled()", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, compiled functions run as they were written, and torch.compile compiles none.

    The stance alone would do; but torch.compile loads the whole of Inductor (2 s) before it looks at the stance. A
    function handed to it here is compiled when it is first called outside: transformers keeps its flex attention.
    Flex attention prepares for a compiler even then, with a backend that wants half of functorch (0.16 s).
    """
    from unittest import mock  # loads asyncio, and every process imports this module

    import torch

    real = torch.compile

    def postponed(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:  # a decorator with options
            return functools.partial(postponed, **options)
        if isinstance(model, torch.nn.Module):
            return real(model, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            made: Callable[..., Any] = real(model, **options)
            return made

        @functools.wraps(model)
        def run(*args: Any, **kwargs: Any) -> Any:
            return (model if _WITHIN.get() else compiled())(*args, **kwargs)

        return run

    flex = sys.modules.get("torch.nn.attention.flex_attention")
    entered = _WITHIN.set(True)
    try:
        with ExitStack() as within:
            within.enter_context(torch.compiler.set_stance("force_eager"))
            within.enter_context(mock.patch.object(torch, "compile", postponed))
            if hasattr(flex, "setup_compilation_env"):
                within.enter_context(mock.patch.object(flex, "setup_compilation_env", nullcontext))
            yield
    finally:
        _WITHIN.reset(entered)
