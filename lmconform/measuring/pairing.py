"""Which weight of one model is which weight of another: found by value, whatever the names and the layout.

A weight that was transferred keeps its numbers, be it transposed, split, fused, padded, or with its rows in another
order. So every row and every column ("fibre") of a matrix is looked up among those of the other model. Vectors follow
the matrix of their module; vectors that are all alike (fresh norms, fresh biases) stay candidates for one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ROW, COLUMN, ELEMENT = "row", "column", "element"
CANDIDATES = 8


@dataclass(frozen=True)
class Link:
    """Fibre i of the subject's parameter is fibre `index[i]` of the reference's; -1 where it is none of them."""

    subject: str
    subject_axis: str
    reference_axis: str
    index: Tensor

    def swapped(self) -> Link:
        """The same fibres taken along the reference's other axis: rows for columns."""
        other = COLUMN if self.reference_axis == ROW else ROW
        return Link(self.subject, self.subject_axis, other, self.index)

    def carry(self, values: Tensor, onto: Tensor) -> Tensor:
        """`values`, laid out as the reference's parameter, in the layout of the subject's; 0 where there is none."""
        source, made = fibres(values, self.reference_axis), fibres(onto, self.subject_axis)
        known = self.index >= 0
        moved = source.new_zeros(made.shape)
        moved[known] = source[self.index[known]]
        return unfibred(moved, onto.shape, self.subject_axis)

    def collect(self, values: Tensor, shape: torch.Size) -> Tensor:
        """The other way round: `values` of the subject's parameter, summed into the layout of the reference's."""
        made = fibres(values, self.subject_axis)
        target = fibres(values.new_zeros(shape), self.reference_axis)
        known = self.index >= 0
        target = target.index_add(0, self.index[known], made[known])
        return unfibred(target, shape, self.reference_axis)


@dataclass
class Pair:
    """One parameter of the reference and where its numbers are in the subject.

    `options` holds alternative sets of links, the likeliest first; none where nothing was found. `found` is the share
    of its fibres that were found, `equal` whether the values agree.
    """

    reference: str
    options: list[list[Link]] = field(default_factory=list)
    found: float = 0.0
    equal: bool = True

    @property
    def links(self) -> list[Link]:
        return self.options[0] if self.options else []

    @property
    def places(self) -> str:
        """The subject's parameters, for a message."""
        names = list(dict.fromkeys(link.subject for link in self.links))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def crossed(link: Link, subject: nn.Module, reference: nn.Module, name: str) -> bool:
    """Whether inputs were taken for outputs: a Linear keeps [out, in], transformers' Conv1D [in, out]."""
    ours, theirs = _outputs(subject, link.subject), _outputs(reference, name)
    if ours is None or theirs is None:
        return False
    return (ours == link.subject_axis) != (theirs == link.reference_axis)


def _outputs(model: nn.Module, name: str) -> str | None:
    """The axis along which a fibre belongs to one output, None where that is not known."""
    from torch import nn

    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Linear):
        return ROW
    return COLUMN if type(owner).__name__ == "Conv1D" else None


def fibres(values: Tensor, axis: str) -> Tensor:
    """[number of fibres, length]: rows along the last axis, columns along the one before, or single elements."""
    if axis == ELEMENT or values.dim() < 2:
        return values.reshape(-1, 1)
    if axis == ROW:
        return values.reshape(-1, values.shape[-1])
    return values.transpose(-1, -2).reshape(-1, values.shape[-2])


def unfibred(made: Tensor, shape: torch.Size, axis: str) -> Tensor:
    """The inverse of `fibres` for that shape."""
    if axis == COLUMN and len(shape) >= 2:
        turned = made.reshape(*shape[:-2], shape[-1], shape[-2])
        return turned.transpose(-1, -2)
    return made.reshape(shape)


def pair_parameters(subject: nn.Module, reference: nn.Module) -> list[Pair]:
    """One Pair for every parameter of the reference, in its order; tied parameters count once."""
    import torch

    theirs: dict[str, Tensor] = dict(reference.named_parameters())
    ours: dict[str, Tensor] = dict(subject.named_parameters())
    dtype = min((p.dtype for p in (*theirs.values(), *ours.values())), key=lambda d: -torch.finfo(d).eps)
    known = _fibre_table(ours, dtype)
    pairs = {
        name: _pair_matrix(name, weight, ours, known, dtype) for name, weight in theirs.items() if weight.dim() >= 2
    }
    _separate_equals(pairs, theirs)
    taken: set[str] = set()
    loose: list[str] = []
    for name, weight in theirs.items():
        if weight.dim() >= 2:
            continue
        pair = _follow_owner(name, weight, pairs, subject, reference, ours)
        if pair is None:
            loose.append(name)
        else:
            pairs[name] = pair
            taken.update(link.subject for link in pair.links)
    for name in loose:
        pairs[name] = _pair_vector(name, theirs[name], loose, theirs, ours, taken, dtype)
    for name, pair in pairs.items():
        if not pair.links and theirs[name].dim() <= 2:
            pairs[name] = _pair_pieces(name, theirs[name], ours, dtype) or pair
    return [pairs[name] for name in theirs]


def unclaimed(subject: nn.Module, pairs: list[Pair]) -> list[str]:
    """Parameters of the subject that no parameter of the reference was found in."""
    claimed = {link.subject for pair in pairs for links in pair.options for link in links}
    return [name for name, _ in subject.named_parameters() if name not in claimed]


def _keys(values: Tensor, axis: str, dtype: torch.dtype) -> Iterator[int | None]:
    """A hash per fibre; None for one that is constant, and so says nothing about where it comes from."""
    import torch

    made = fibres(values.detach().to("cpu", dtype).to(torch.float32), axis).contiguous()
    plain = (made == made[:, :1]).all(-1).tolist()
    for constant, row in zip(plain, made.numpy()):
        yield None if constant else hash(row.tobytes())


def _fibre_table(ours: dict[str, Tensor], dtype: torch.dtype) -> dict[int, list[tuple[str, str, int]]]:
    table: dict[int, list[tuple[str, str, int]]] = {}
    for name, weight in ours.items():
        if weight.dim() < 2:
            continue
        for axis in (ROW, COLUMN):
            for index, key in enumerate(_keys(weight, axis, dtype)):
                if key is not None:
                    table.setdefault(key, []).append((name, axis, index))
    return table


def _pair_matrix(
    name: str, weight: Tensor, ours: dict[str, Tensor], known: dict[int, list[tuple[str, str, int]]], dtype: torch.dtype
) -> Pair:
    import torch

    hits: dict[tuple[str, str, str], dict[int, int]] = {}
    telling: dict[str, set[int]] = {ROW: set(), COLUMN: set()}
    for axis in (ROW, COLUMN):
        own: dict[int, list[int]] = {}
        for index, key in enumerate(_keys(weight, axis, dtype)):
            if key is not None:
                telling[axis].add(index)
                own.setdefault(key, []).append(index)
        for key, indices in own.items():
            met: dict[tuple[str, str], int] = {}
            for place, place_axis, place_index in known.get(key, ()):
                rank = met[place, place_axis] = met.get((place, place_axis), -1) + 1  # equal fibres pair up in order
                hits.setdefault((place, place_axis, axis), {})[place_index] = indices[rank % len(indices)]
    best: dict[str, tuple[int, Link, set[int]]] = {}
    for (place, place_axis, axis), found in hits.items():
        size = len(found) * fibres(weight, axis).shape[1]
        if place in best and best[place][0] >= size:
            continue
        order = torch.full((fibres(ours[place], place_axis).shape[0],), -1, dtype=torch.long)
        for place_index, own_index in found.items():
            order[place_index] = own_index
        best[place] = (size, Link(place, place_axis, axis, order), set(found.values()))
    if not best:
        return Pair(name, found=0.0 if any(telling.values()) else 1.0, equal=False)
    covered: dict[str, set[int]] = {ROW: set(), COLUMN: set()}
    for _, link, matched in best.values():
        covered[link.reference_axis] |= matched
    share = max(len(covered[axis]) / len(telling[axis]) for axis in (ROW, COLUMN) if telling[axis])
    links = [link for _, link, _ in best.values()]
    largest = max(size for size, _, _ in best.values())
    if (
        largest == weight.numel()
    ):  # it is somewhere as a whole: a part elsewhere is chance, unless it is most of a tensor
        whole = [k for size, k, _ in best.values() if size == largest]
        links = [k for k in whole if 2 * int((k.index >= 0).sum()) >= len(k.index)] or whole
    return Pair(name, [links], share, equal=share == 1.0)


def _separate_equals(pairs: dict[str, Pair], theirs: dict[str, Tensor]) -> None:
    """Matrices of equal values (the same start in every layer) are candidates for one another, by their order."""
    import torch

    def same(left: Tensor, right: Tensor) -> bool:
        return left.shape == right.shape and bool(torch.equal(left, right))

    for name, pair in pairs.items():
        if len(pair.links) < 2:
            continue
        whole = [link for link in pair.links if set(range(int(link.index.max()) + 1)) <= set(link.index.tolist())]
        equals = [other for other in pairs if same(theirs[other], theirs[name])]
        if len(equals) < 2 or len(whole) < 2:
            continue
        rank = equals.index(name)
        pair.options = [[link] for link in [*whole[rank : rank + 1], *whole[:rank], *whole[rank + 1 :]]][:CANDIDATES]


def _follow_owner(
    name: str, vector: Tensor, pairs: dict[str, Pair], subject: nn.Module, reference: nn.Module, ours: dict[str, Tensor]
) -> Pair | None:
    """A bias goes where its module's matrix goes; None where it has none, or that was not found whole."""
    import torch

    owner, _, leaf = name.rpartition(".")
    weight = pairs.get(f"{owner}.weight")
    if weight is None or not weight.links or weight.found < 1.0:
        return None
    units = COLUMN if type(reference.get_submodule(owner)).__name__ == "Conv1D" else ROW  # one fibre per output
    links = []
    for link in weight.links:
        place = f"{link.subject.rpartition('.')[0]}.{leaf}"
        if place not in ours or ours[place].dim() != 1:
            continue
        size = ours[place].shape[0]
        if link.reference_axis == units:
            index = link.index
        elif size == vector.shape[0]:
            index = torch.arange(size)
        else:
            continue
        if index.shape[0] == size:
            links.append(Link(place, ELEMENT, ELEMENT, index))
    if not links:
        empty = all(_left_empty(subject, link, leaf) for link in weight.links)
        constant = bool((vector == vector.flatten()[0]).all())  # one that looks like it elsewhere is another's
        return Pair(name, equal=False) if empty and constant else None
    equal = all(
        bool(torch.equal(ours[k.subject][k.index >= 0].cpu().double(), vector[k.index[k.index >= 0]].cpu().double()))
        for k in links
    )
    covered = set().union(*(set(link.index[link.index >= 0].tolist()) for link in links))
    return Pair(name, [links], len(covered) / vector.shape[0], equal)


def _left_empty(subject: nn.Module, link: Link, leaf: str) -> bool:
    """Whether the module that holds the matrix was made without that vector: bias=False."""
    own = subject.get_submodule(link.subject.rpartition(".")[0])._parameters
    return leaf in own and own[leaf] is None


def _pair_pieces(name: str, values: Tensor, ours: dict[str, Tensor], dtype: torch.dtype) -> Pair | None:
    """One bias there, several here, or the other way round, or one a head: found as a run of consecutive numbers.

    None where it is one number throughout, or none of it is found.
    """
    import torch

    whole = values.detach().flatten().cpu().to(dtype)
    links: list[Link] = []
    covered: set[int] = set()
    for place, value in ours.items():
        if not len(whole) / 8 <= value.numel() <= 8 * len(whole):
            continue
        own = value.detach().flatten().cpu().to(dtype)
        if bool((own == own[0]).all()):
            continue
        short, long = (own, whole) if len(own) <= len(whole) else (whole, own)
        starts = (long[: len(long) - len(short) + 1] == short[0]).nonzero().flatten().tolist()
        start = next((at for at in starts if torch.equal(long[at : at + len(short)], short)), None)
        if start is None or bool((short == short[0]).all()):
            continue
        index = torch.arange(start, start + len(own))
        if short is whole:
            index = torch.full((len(own),), -1).index_copy(0, index[: len(whole)], torch.arange(len(whole)))
        links.append(Link(place, ELEMENT, ELEMENT, index))
        covered.update(index[index >= 0].tolist())
    share = len(covered) / len(whole)
    return Pair(name, [links], share, equal=share == 1.0) if links else None


def _pair_vector(
    name: str,
    vector: Tensor,
    loose: list[str],
    theirs: dict[str, Tensor],
    ours: dict[str, Tensor],
    taken: set[str],
    dtype: torch.dtype,
) -> Pair:
    """By value; among vectors of equal values by their order, the others as further options."""
    import torch

    def same(left: Tensor, right: Tensor) -> bool:
        return left.shape == right.shape and bool(torch.equal(left.cpu().to(dtype), right.cpu().to(dtype)))

    rank = [other for other in loose if same(theirs[other], vector)].index(name)
    places = [place for place, value in ours.items() if place not in taken and same(value, vector)]
    ordered = [*places[rank : rank + 1], *places[:rank], *places[rank + 1 :]][:CANDIDATES]
    index = torch.arange(vector.numel())
    options = [[Link(place, ELEMENT, ELEMENT, index)] for place in ordered]
    return Pair(name, options, 1.0 if options else 0.0, bool(options))
