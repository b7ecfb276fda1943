"""Weights that arrived, in one another's place or in another order: tried out on the subject, and put back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform.context import Hint
from lmconform.measuring.pairing import Link, Pair, fibres, unfibred

if TYPE_CHECKING:
    from torch import Tensor, nn

    # whose places are tried, and what numbers go where
    Trial = tuple[list[tuple[Pair, Link]], list[tuple[Link, Tensor]]]

MOST = 120  # trials, each one forward


@dataclass(frozen=True)
class Misplacement:
    """What was tried out and brings the logits back: the weights of the reference concerned, and their places here."""

    pairs: list[Pair]
    places: str
    hint: Hint


def misplacement(
    module: nn.Module, wrong: list[Pair], differs: Callable[[], float], bound: float
) -> Misplacement | None:
    """The exchange of two places, or the order in one, that brings the logits to a quarter of the difference or less.

    `wrong`: pairs whose weights act otherwise than in the reference. `differs`: the subject's largest difference to it,
    anew. Two places can be exchanged that hold as many fibres of one length: q and k, a gate and its up projection,
    rows of k and v in a fused matrix. None where nothing helps.
    """
    before = differs()
    best: tuple[float, list[Pair], list[str], str] | None = None
    held = [(pair, link) for pair in wrong for link in pair.links]
    for concerned, changes in itertools.islice(_trials(module, held), MOST):
        with _changed(module, changes):
            after = differs()
        if after < before / 4 and (best is None or after < best[0]):
            places = list(dict.fromkeys(_place(module, link) for _, link in concerned))
            what = "with one another's numbers" if len(concerned) > 1 else "with its numbers in the reference's order"
            best = after, [pair for pair, _ in concerned], places, what
    if best is None:
        return None
    after, pairs, places, what = best
    verdict = (
        "equal the reference's" if after <= bound else f"come {before / after:.2g} times closer to the reference's"
    )
    return Misplacement(
        pairs,
        " and ".join(places),
        Hint(
            f"tried out: with {' and '.join(places)} {what}, the logits {verdict}: "
            + ("they were transferred to each other's place" if len(places) > 1 else "a reshape or a split went wrong"),
            "weights.sliced_wrong",
            "attention.heads_scrambled",
        ),
    )


def _trials(module: nn.Module, held: list[tuple[Pair, Link]]) -> Iterator[Trial]:
    """Whose places, and the numbers to be put there; made one at a time, for each holds copies of weights."""
    for pair, link in held:
        if _permuted(link):
            yield [(pair, link)], [(link, _fibres(module, link)[link.index[link.index >= 0].argsort()])]
    for one, other in itertools.combinations(held, 2):
        mine, theirs = _fibres(module, one[1]), _fibres(module, other[1])
        if mine.shape == theirs.shape and not bool((mine == theirs).all()):
            yield [one, other], [(one[1], theirs), (other[1], mine)]


def _fibres(module: nn.Module, link: Link) -> Tensor:
    """The fibres that the link knows, as the subject holds them."""
    place = module.get_parameter(link.subject).detach()
    return fibres(place, link.subject_axis)[(link.index >= 0).to(place.device)]


def _permuted(link: Link) -> bool:
    known = link.index[link.index >= 0]
    return len(known) > 1 and bool((known[1:] < known[:-1]).any())


@contextmanager
def _changed(module: nn.Module, changes: list[tuple[Link, Tensor]]) -> Iterator[None]:
    """While it lasts, the fibres that each link knows are those given."""
    import torch

    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for link, values in changes:
            place = module.get_parameter(link.subject)
            before.setdefault(link.subject, place.detach().clone())
            made = fibres(place, link.subject_axis).clone()
            made[(link.index >= 0).to(place.device)] = values
            place.copy_(unfibred(made, place.shape, link.subject_axis))
        try:
            yield
        finally:
            for name, values in before.items():
                module.get_parameter(name).copy_(values)


def _place(module: nn.Module, link: Link) -> str:
    """The parameter, and where the link knows one run of its fibres only, which."""
    known = (link.index >= 0).nonzero().flatten().tolist()
    if len(known) == len(link.index):
        return link.subject
    return f"{link.subject_axis}s {known[0]} to {known[-1]} of {link.subject}"
