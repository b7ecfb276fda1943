"""Python's and torch's global state, kept whatever a subject does to it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Within it a subject may draw random numbers, switch gradients off, set a default dtype: outside nothing shows."""
    import numpy
    import torch

    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    drawn, numpy_drawn = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        random.setstate(drawn)
        numpy.random.set_state(numpy_drawn)
