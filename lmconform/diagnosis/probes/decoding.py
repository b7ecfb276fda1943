"""Why does a cached step differ from one forward: its positions, its mask, or what is in the cache?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.places import first_difference
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen


def probe(subject: Specimen, seed: int) -> dict[str, tuple[float, str]]:
    """The last token of a text on top of the cache of the rest, with and without explicit positions."""
    import torch

    if not subject.can("cache"):
        raise Unavailable("no cache")
    time = subject.longest(20)
    ids = random_ids(subject.ordinary_ids, 1, time, torch.Generator().manual_seed(seed)).to(subject.device)
    whole = subject.logits(ids)[:, -1:]
    bound = tolerance.allowed(subject.noise, whole)

    def step(positions: Tensor | None = None) -> Tensor:
        cache = subject.forward(ids[:, :-1], use_cache=True).cache
        return subject.forward(ids[:, -1:], cache=cache, use_cache=True, positions=positions).logits

    if float((step() - whole).abs().max()) <= bound:
        return {}
    found: dict[str, tuple[float, str]] = {}
    if subject.convention.positions is not None:
        explicit = torch.full((1, 1), subject.first_position + time - 1, device=ids.device)
        cured = float((step(explicit) - whole).abs().max()) <= bound
        where = "with explicit position_ids the cached step is right" if cured else ""
        found["position.restarts_on_decode"] = (2.0, where) if cured else (-1.2, "")

    def last(tensor: Tensor) -> Tensor | None:
        return tensor[:, -1:] if tensor.dim() >= 2 and tensor.shape[1] in (1, time) else None

    cache = subject.forward(ids[:, :-1], use_cache=True).cache
    place = first_difference(
        subject,
        (lambda: subject.forward(ids[:, -1:], cache=cache, use_cache=True), last),
        (lambda: subject.logits(ids), last),
    )
    for cause in (
        "cache.stale",
        "cache.wrong_value",
        "cache.truncated",
        "cache.ignored",
        "position.restarts_on_decode",
    ):
        odds, where = found.get(cause, (0.0, ""))
        found[cause] = (odds, "; ".join(filter(None, [place, where])))
    return found
