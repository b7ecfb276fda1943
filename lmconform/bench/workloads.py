"""What is timed: forward, backward, prefill, decode and generate of a built subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform.bench.pairing import Task
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen


@dataclass(frozen=True)
class Sizes:
    """Prompts [batch, time]; `new` tokens are decoded behind them."""

    batch: int = 2
    time: int = 64
    new: int = 16


def forward(subject: Specimen, ids: Tensor, new: int) -> Task:
    """Logits of all positions, without gradients and without a cache."""
    return Task(lambda: subject.logits(ids))


def backward(subject: Specimen, ids: Tensor, new: int) -> Task:
    """The backward pass alone of the mean next-token cross-entropy, dropout off; the forward pass is not timed."""
    from torch.nn import functional as F

    def prepare() -> tuple[Any]:
        subject.module.zero_grad(set_to_none=True)
        logits = subject.logits(ids, grad=True)
        return (F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()),)

    return Task(lambda loss: loss.backward(), prepare)


def prefill(subject: Specimen, ids: Tensor, new: int) -> Task:
    """The prompt with a cache to be filled."""
    _require(subject, "cache")
    return Task(lambda: subject.forward(ids, use_cache=True))


def decode(subject: Specimen, ids: Tensor, new: int) -> Task:
    """`new` steps of one token behind a prompt whose cache is filled already."""
    _require(subject, "cache")
    tokens = ids[:, :1].expand(-1, new).contiguous()

    def run(cache: Any) -> None:
        for step in range(new):
            cache = subject.forward(tokens[:, step : step + 1], cache=cache, use_cache=True).cache

    return Task(run, lambda: (subject.forward(ids, use_cache=True).cache,))


def generate(subject: Specimen, ids: Tensor, new: int) -> Task:
    """The model's own generate(), greedy, exactly `new` tokens. Raises Unavailable where it gives another number."""
    from lmconform.measuring.generating import Generator

    _require(subject, "gen")
    generator = Generator(subject)
    mask = {"mask": ids.new_ones(ids.shape)} if generator.hugging_face else {}
    made = generator.greedy(ids, new, **mask)
    if made.shape[1] != new:
        raise Unavailable(f"generate() gave {made.shape[1]} tokens where {new} were asked for")
    return Task(lambda: generator.greedy(ids, new, **mask))


WORKLOADS: dict[str, Callable[[Specimen, Tensor, int], Task]] = {
    "forward": forward,
    "backward": backward,
    "prefill": prefill,
    "decode": decode,
    "generate": generate,
}


def _require(subject: Specimen, capability: str) -> None:
    found = subject.can(capability)
    if not found:
        raise Unavailable(found.reason)
