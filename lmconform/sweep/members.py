"""Trains many copies of one model at once, each with its own learning rate and initial weights.

The weights of all members are stacked and `torch.func.vmap` runs the model over the stack, so that one operation does
the work of all; the steps are those of `torch.optim.AdamW` itself, a parameter group for each rate. A step is recorded
once and then run without the model's Python (`recording`). Where a model cannot be run that way the members are trained
one at a time, and the reason is kept.

What bounds it on a CPU is each member's own arithmetic: its matrix products, whose weights no cache can hold for all,
and AdamW's roots and divisions. One at a time it is the Python of model, autograd and optimizer, so that the gain is
the larger the smaller the model. Losses are those of one at a time up to rounding, which training at high rates
amplifies as it does any other rounding (a batch's rows in another order, say).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmconform.sweep.batches import Batch, Batches, Loss, cross_entropy, logits_of
from lmconform.sweep.stacking import Vectorised, vectorisable
from lmconform.sweep.stepping import Stepping

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

DIVERGED = 4.0  # a loss this many times the first one is given up
SETTLING = 5  # but not within the first steps
MEMORY = 2 << 30  # bytes that the members of one chunk may take, if so much is free
TENSORS = 6  # of the weights' size that a member takes: weights, two moments, gradients as they come and side by side


@dataclass(frozen=True)
class Member:
    """One training run."""

    rate: float
    seed: int


@dataclass
class Training:
    """What came of it. `losses`: one list a member, as long as it was trained; `reason`: why not vectorised."""

    members: list[Member]
    losses: list[list[float]]
    diverged: list[bool]
    mode: str
    reason: str = ""
    seconds: float = 0.0
    member_bytes: int = 0
    chunk: int = 1
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    _starts: dict[int, Specimen] = field(default_factory=dict, repr=False)

    def trained(self, index: int) -> Specimen:
        """That member's model with the weights it ended with, and what it has learnt in its buffers."""
        import torch

        member = self._starts[self.members[index].seed].copy()
        own = {**dict(member.module.named_parameters()), **dict(member.module.named_buffers())}
        with torch.no_grad():
            for name, value in self.weights[index].items():
                if name in own and own[name].shape == value.shape:  # not a table that was extended on the way
                    own[name].copy_(value)
        return member


def train(
    subject: Specimen,
    members: Sequence[Member],
    batches: Batches,
    steps: int,
    *,
    loss: Loss = cross_entropy,
    labels: bool = False,
    sequential: bool = False,
    done_below: float | None = None,
    one_is_enough: bool = False,
    keep: bool = True,
    memory: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Training:
    """Train every member for `steps` steps of AdamW (torch's defaults) with dropout off, from its seed's fresh weights.

    A subject that cannot be built again starts every member from the weights it came with. With `labels` the model is
    given its labels too, as a Trainer would. A member whose loss diverges is stopped; one that was below `done_below`
    for three steps has reached its end; with `one_is_enough` the others end there too. Without `keep` no
    trained weights are kept. Raises NothingToTrain where every parameter is frozen.
    """
    from lmconform.measuring.dropout import without_dropout

    started = time.perf_counter()
    starts = {
        seed: without_dropout(subject.fresh(seed) if subject.builder is not None else subject.as_loaded())
        for seed in dict.fromkeys(member.seed for member in members)
    }
    first = next(iter(starts.values()))
    made = Training(list(members), [[] for _ in members], [False] * len(members), "sequential")
    made.weights, made._starts = [{} for _ in members], starts
    if not any(weight.requires_grad for weight in first.module.parameters()):
        raise NothingToTrain("no parameter requires a gradient: everything is frozen")
    judge = _Judge(made, done_below, one_is_enough)
    example = batches(0, members[0].seed)
    if sequential:
        run, made.reason = None, "asked for"
    elif len(members) == 1:
        run, made.reason = None, "there is one member"
    else:
        run, made.reason = vectorisable(subject, first, example, loss, labels)
    if run is None:
        for index in range(len(members)):
            if judge.over:
                break
            _one(made, index, batches, steps, loss, labels, judge, keep)
            progress((index + 1) * steps, len(members) * steps)
    else:
        made.mode = "vectorised"
        made.member_bytes = _member_bytes(first, example, loss, labels)
        made.chunk = max(1, min(len(members), (memory or _free(first)) // made.member_bytes))
        for low in range(0, len(members), made.chunk):
            if judge.over:
                break
            part = range(low, min(low + made.chunk, len(members)))
            _together(made, part, batches, steps, run, judge, keep, progress)
    made.seconds = time.perf_counter() - started
    return made


class _Judge:
    """Says, step by step, whether a member goes on."""

    def __init__(self, made: Training, done_below: float | None, one_is_enough: bool) -> None:
        self.made = made
        self.done_below = done_below
        self.one_is_enough = one_is_enough
        self.over = False

    def goes_on(self, index: int, loss: float) -> bool:
        losses = self.made.losses[index]
        losses.append(loss)
        if not math.isfinite(loss) or (len(losses) > SETTLING and loss > DIVERGED * losses[0]):
            self.made.diverged[index] = True
            return False
        if self.done_below is None or len(losses) < 3 or max(losses[-3:]) >= self.done_below:
            return True
        self.over = self.one_is_enough
        return False


# -- one at a time -------------------------------------------------------------------------------------------------


def _one(
    made: Training, index: int, batches: Batches, steps: int, loss: Loss, labels: bool, judge: _Judge, keep: bool
) -> None:  # fmt: skip
    import torch

    member = made.members[index]
    copy = made._starts[member.seed].copy()
    named = {name: weight for name, weight in copy.module.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=member.rate)
    for step in range(steps):
        batch = batches(step, member.seed)
        optimizer.zero_grad()
        value = loss(logits_of(copy, batch, labels), batch.targets)
        if value.requires_grad:
            value.backward()
        going = judge.goes_on(index, float(value.detach()))
        if made.diverged[index]:
            break
        optimizer.step()
        if not going:
            break
    if keep:
        learnt = {**named, **dict(copy.module.named_buffers())}
        made.weights[index] = {name: tensor.detach() for name, tensor in learnt.items()}


class NothingToTrain(ValueError):
    """Every parameter is frozen."""


# -- together ------------------------------------------------------------------------------------------------------


def _together(
    made: Training, part: range, batches: Batches, steps: int, run: Vectorised, judge: _Judge, keep: bool,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Train the members of one chunk side by side."""
    import torch

    assert run.layout is not None
    alive: list[int | None] = list(part)  # by place in the stack; None where a member has come to its end
    flat = run.layout.stacked([made._starts[made.members[index].seed].module for index in part])
    rows = _Rows(flat, [made.members[index].rate for index in part])
    stepping = Stepping(run)
    run.specimen.module.train()
    for step in range(steps):
        given = {made.members[index].seed: None for index in alive if index is not None}
        drawn = {seed: batches(step, seed) for seed in given}
        any_batch = next(iter(drawn.values()))
        shared = len({id(batch) for batch in drawn.values()}) == 1
        own = [any_batch if index is None else drawn[made.members[index].seed] for index in alive]
        ids = any_batch.ids if shared else torch.stack([batch.ids for batch in own])
        targets = any_batch.targets if shared else torch.stack([batch.targets for batch in own])
        values = stepping.step(rows.flat, rows.gradient, ids, targets, shared, steps - step).tolist()
        going = [index is not None and judge.goes_on(index, value) for index, value in zip(alive, values, strict=True)]
        rows.step([index is not None and not made.diverged[index] for index in alive])
        last = judge.over or step == steps - 1
        for place, on in enumerate(going):
            index = alive[place]
            if index is None or (on and not last):
                continue
            if keep:
                views = run.layout.views(rows.flat[place : place + 1].clone())
                made.weights[index] = {name: view[0] for name, view in views.items()}
            alive[place] = None
        kept = [place for place, index in enumerate(alive) if index is not None]
        progress(part.start * steps + (step + 1) * len(part), len(made.members) * steps)
        if not kept:
            break
        if len(kept) <= stepping.room * len(alive):
            alive = [alive[place] for place in kept]
            rows.keep(kept)


class _Rows:
    """torch.optim.AdamW over the rows of one tensor [members, size], a parameter group for each rate."""

    def __init__(self, flat: Tensor, rates: Sequence[float]) -> None:
        import torch

        self.flat = flat
        self.rates = list(rates)
        self.gradient = torch.empty_like(flat)
        self.rows: list[Tensor] = []
        self.optimizer: Any = None
        self._over([{} for _ in rates])

    def _over(self, states: list[dict[str, Any]]) -> None:
        import torch

        self.rows = [torch.nn.Parameter(row) for row in self.flat.detach().unbind()]
        groups = [
            {"params": [row for row, its in zip(self.rows, self.rates, strict=True) if its == rate], "lr": rate}
            for rate in dict.fromkeys(self.rates)
        ]
        fused = self.flat.device.type in ("cpu", "cuda", "mps")
        self.optimizer = torch.optim.AdamW(groups, fused=fused)
        for row, state in zip(self.rows, states, strict=True):
            if state:
                self.optimizer.state[row] = state

    def step(self, live: Sequence[bool]) -> None:
        """One step by `gradient`; members that are not live keep their weights."""
        for row, gradient, on in zip(self.rows, self.gradient.unbind(), live, strict=True):
            row.grad = gradient if on else None
        self.optimizer.step()

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone, moments included."""
        import torch

        states = [self.optimizer.state.get(self.rows[place], {}) for place in places]
        self.flat = self.flat[list(places)].contiguous()
        self.rates = [self.rates[place] for place in places]
        self.gradient = torch.empty_like(self.flat)
        self._over(states)


# -- memory --------------------------------------------------------------------------------------------------------


def _member_bytes(start: Specimen, example: Batch, loss: Loss, labels: bool) -> int:
    """What one member takes: weights, moments, gradients, and twice what its forward pass saves for backward."""
    import torch

    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(logits_of(start, example, labels), example.targets)
    weights = sum(p.numel() * p.element_size() for p in start.module.parameters() if p.requires_grad)
    return TENSORS * weights + 2 * sum(saved.values())


def _free(start: Specimen) -> int:
    """Bytes that a chunk may take: at most a quarter of what is free."""
    import torch

    from lmconform.specimen import available_memory

    if start.device.type == "cuda":
        return int(torch.cuda.mem_get_info(start.device)[0]) // 2
    return min(MEMORY, available_memory() // 4)
