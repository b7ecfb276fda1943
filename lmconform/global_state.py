"""Python's and torch's global state, kept whatever a subject does to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Within it a subject may draw random numbers, switch gradients off, set a default dtype: outside nothing shows."""
    import torch

    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
