"""Running what asks for torch.compile without compiling it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

_WITHIN: ContextVar[bool] = ContextVar("within uncompiled()", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, compiled functions run as they were written, and torch.compile compiles none.

    The stance alone would do; but torch.compile loads the whole of Inductor (2 s) before it looks at the stance. A
    function handed to it here is compiled when it is first called outside: transformers keeps its flex attention.
    """
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

    entered = _WITHIN.set(True)
    try:
        with torch.compiler.set_stance("force_eager"), mock.patch.object(torch, "compile", postponed):
            yield
    finally:
        _WITHIN.reset(entered)
