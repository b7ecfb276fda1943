"""What a subject does on fixed cases, in figures: sketches of logits, hidden states and gradients, in float64.

A sketch of a vector is its RMS and three projections on fixed vectors of signs, over sqrt(length): any change moves
them, and the change of a projection is about the RMS of the vector's change, whatever the width.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmconform.conventions import first_line
from lmconform.global_state import global_state_kept
from lmconform.measuring import traces
from lmconform.snapshots import SnapshotError, counting
from lmconform.snapshots.drawing import Deal, draw, parameters
from lmconform.snapshots.last_bits import SINGLE, last_bits, wobble_buffers

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lmconform.specimen import Specimen

ROWS, TIME, LONGEST = 2, 24, 128
PAD = 3
FIRST = 3
CACHED_STEPS = 6
PROMPT, NEW = 6, 10
PROJECTIONS = 3
RUNS = {False: 1, True: 3}  # with moved last bits, by Noise.single: the first kind decides nothing, it is told
REPEATABLE = 1e-6  # of a figure's size: what two equal calls may differ by (threads), far below any dropout

FORWARDS = ("batch", "quiet", "long")
CASES = {
    "batch": f"{ROWS} rows of {TIME} tokens: logits, the stream after every block, every module's output",
    "quiet": "the same with smaller weights, where a norm's epsilon is felt",
    "long": f"1 row of {LONGEST} tokens, or as many as the context takes",
    "padded": f"the batch, its first row padded by {PAD} on the left: logits of the real tokens, in float32",
    "positioned": f"the batch with position_ids that count from {FIRST}",
    "cached": f"the batch, its last {CACHED_STEPS} tokens fed one at a time with the cache",
    "loss": "the model's own loss on the batch",
    "gradients": "of cross-entropy, computed outside the model, at every parameter",
    "greedy": f"{NEW} tokens continued greedily from the first {PROMPT} of each row",
}


@dataclass
class Tokens:
    """The inputs of all cases, int64: `batch` [rows, time], `long` [1, time]."""

    batch: NDArray[np.int64]
    long: NDArray[np.int64]


def choose_tokens(subject: Specimen, seed: int) -> Tokens:
    """Ordinary tokens, the same on every machine."""
    ordinary = np.array(subject.ordinary_ids)

    def tokens(name: str, rows: int, time: int) -> NDArray[np.int64]:
        return np.asarray(ordinary[counting.below(counting.stream(name, seed), rows * time, len(ordinary))]).reshape(
            rows, time
        )

    return Tokens(tokens("batch", ROWS, subject.longest(TIME)), tokens("long", 1, subject.longest(LONGEST)))


@dataclass
class Measured:
    """One pass over all cases. `figures` are [rows, 1 + PROJECTIONS] (loss: [1, 1]), by key; NaN where there is none.

    Keys are "batch/0" (what enters the first block), "batch/1" (what leaves it), ..., "batch/logits", "batch/modules",
    the same for "quiet" and "long", "padded/logits", "positioned/logits",
    "cached/logits", "loss", "gradients" and "weights".
    """

    figures: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # names of states by case, of modules by key
    greedy: NDArray[np.int64] | None = None
    missing: dict[str, str] = field(default_factory=dict)  # case: why it gives nothing


def measure(
    subject: Specimen,
    tokens: Tokens,
    made: Deal,
    *,
    seed: int,
    as_loaded: bool,
    noise: Noise | None = None,
    luck: int = 0,
) -> Measured:
    """Run every case that the subject can. What a case raises goes into `missing`.

    `luck` seeds torch's random stream, on which nothing here should depend.
    """
    import torch

    found = Measured()
    with global_state_kept(), _hushed():
        torch.default_generator.manual_seed(luck)
        loud, quiet = _weighted(subject, made, seed, False, as_loaded), _weighted(subject, made, seed, True, as_loaded)
        if noise is not None:
            for drawn in (loud, quiet):
                wobble_buffers(drawn.module, noise.seed)
        _weights(found, loud, made)
        runs: dict[str, Callable[[], None]] = {
            "batch": lambda: _forward(found, loud, "batch", tokens.batch),
            "quiet": lambda: _forward(found, quiet, "quiet", tokens.batch),
            "long": lambda: _forward(found, loud, "long", tokens.long),
            "padded": lambda: _padded(found, loud, tokens.batch),
            "positioned": lambda: _positioned(found, loud, tokens.batch),
            "cached": lambda: _cached(found, loud, tokens.batch),
            "loss": lambda: _loss(found, loud, tokens.batch),
            "greedy": lambda: _greedy(found, loud, tokens.batch),
            "gradients": lambda: _gradients(found, loud, tokens.batch, made),
        }
        for case, run in runs.items():
            with noise.mode(case) if noise is not None else nullcontext():
                try:
                    run()
                except _Missing as absent:
                    found.missing[case] = str(absent)
                except MemoryError:
                    raise
                except Exception as error:
                    found.missing[case] = f"raised {type(error).__name__}: {first_line(error)}"
    return found


@dataclass(frozen=True)
class Noise:
    """Results moved in their last bits: of their own dtype, or (`single`) of float32 whatever the dtype."""

    seed: int
    single: bool

    def mode(self, case: str) -> AbstractContextManager[Any]:
        return last_bits(counting.stream(case, self.seed) >> 1, SINGLE if self.single else None)


class _Missing(Exception):
    """The subject does not offer this case."""


def _weighted(subject: Specimen, made: Deal, seed: int, quiet: bool, as_loaded: bool) -> Specimen:
    copied = subject.copy()
    copied.module.eval()
    draw(copied.module, made, seed, quiet=quiet, as_loaded=as_loaded)
    return copied


@contextmanager
def _hushed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- sketches ----------------------------------------------------------------------------------------------------------


def sketch(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rows, width] to [rows, 1 + PROJECTIONS]: RMS, and projections of the same size."""
    width = rows.shape[-1]
    directions = np.stack([counting.signs(counting.stream("sketch", j), width) for j in range(PROJECTIONS)], axis=1)
    size = np.sqrt(np.square(rows).mean(-1, keepdims=True)) if width else np.zeros((len(rows), 1))
    return np.concatenate([size, rows @ directions / np.sqrt(max(width, 1))], axis=-1)


def _rows(value: Tensor) -> NDArray[np.float64]:
    """[..., width] to [rows, width], out of torch's sight."""
    import torch

    flat = value.detach().to("cpu", torch.float64)
    return np.asarray(flat.reshape(-1, flat.shape[-1]).numpy())


def _whole(value: Tensor) -> NDArray[np.float64]:
    import torch

    return sketch(np.asarray(value.detach().to("cpu", torch.float64).reshape(1, -1).numpy()))


# -- cases -------------------------------------------------------------------------------------------------------------


def _ids(subject: Specimen, tokens: NDArray[np.int64]) -> Tensor:
    import torch

    return torch.from_numpy(np.array(tokens)).to(subject.device)


def _forward(found: Measured, subject: Specimen, case: str, tokens: NDArray[np.int64]) -> None:
    ids = _ids(subject, tokens)
    streams: list[traces.Stream | None] = []
    logits: list[Tensor] = []

    def run() -> None:
        streams.append(traces.stream(subject, ids))
        logits.append(subject.logits(ids) if streams[0] is None else streams[0].logits)

    calls: list[traces.Call] = []
    if case == "long":
        run()
    else:
        calls = [call for call in traces.recorded(subject, run) if call.output.numel()]
    if streams[0] is not None:
        found.places[case] = streams[0].names
        for index, state in enumerate(streams[0].states):
            found.figures[f"{case}/{index}"] = sketch(_rows(state))
    found.figures[f"{case}/logits"] = sketch(_rows(logits[0]))
    if calls:
        seen: Counter[str] = Counter()
        names = []
        for call in calls:
            seen[call.name] += 1
            names.append(call.name if seen[call.name] == 1 else f"{call.name} (call {seen[call.name]})")
        found.places[f"{case}/modules"] = names
        found.figures[f"{case}/modules"] = np.concatenate([_whole(call.output) for call in calls])


def _padded(found: Measured, subject: Specimen, tokens: NDArray[np.int64]) -> None:
    if not (able := subject.can("mask")):
        raise _Missing(able.reason)
    ids = _ids(subject, tokens)
    mask = ids.new_ones(ids.shape)
    mask[0, :PAD] = 0
    single = subject.copy()
    single.module.float()  # some float64 masks add up to -inf over padding, and give NaN where float32 is sound
    figures = sketch(_rows(single.logits(ids, mask=mask)))
    figures[:PAD] = 0.0  # what is said of padding is nobody's business
    found.figures["padded/logits"] = figures


def _positioned(found: Measured, subject: Specimen, tokens: NDArray[np.int64]) -> None:
    import torch

    if not (able := subject.can("pos")):
        raise _Missing(able.reason)
    ids = _ids(subject, tokens)
    time = ids.shape[1]
    if subject.context_length is not None and time + FIRST > subject.context_length:
        raise _Missing(f"a context of {subject.context_length} tokens leaves no room")
    positions = torch.arange(FIRST, FIRST + time, device=ids.device).expand(ids.shape)
    found.figures["positioned/logits"] = sketch(_rows(subject.logits(ids, positions=positions)))


def _cached(found: Measured, subject: Specimen, tokens: NDArray[np.int64]) -> None:
    if not (able := subject.can("cache")):
        raise _Missing(able.reason)
    ids = _ids(subject, tokens)
    split = max(1, ids.shape[1] - CACHED_STEPS)
    output = subject.forward(ids[:, :split], use_cache=True)
    steps = [_rows(output.logits[:, -1])]
    for index in range(split, ids.shape[1]):
        if output.cache is None:
            raise _Missing("a cached step gives no cache back")
        output = subject.forward(ids[:, index : index + 1], cache=output.cache, use_cache=True)
        steps.append(_rows(output.logits[:, -1]))
    together = np.stack(steps, axis=1)  # [rows, steps, vocab]
    found.figures["cached/logits"] = sketch(together.reshape(-1, together.shape[-1]))


def _loss(found: Measured, subject: Specimen, tokens: NDArray[np.int64]) -> None:
    if not (able := subject.can("labels")):
        raise _Missing(able.reason)
    ids = _ids(subject, tokens)
    output = subject.forward(ids, labels=ids, use_cache=False)
    if output.loss is None:
        raise _Missing("forward() with labels gives no loss")
    found.figures["loss"] = np.array([[float(output.loss.detach())]])


def _gradients(found: Measured, subject: Specimen, tokens: NDArray[np.int64], made: Deal) -> None:
    import torch

    ids = _ids(subject, tokens)
    for parameter in subject.module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad():
        logits = subject.logits(ids, grad=True)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    known = parameters(subject.module)
    rows = np.full((len(made.slots), 1 + PROJECTIONS), np.nan)
    for index, names in enumerate(made.holders):
        if names is not None and known[names].is_floating_point():
            gradient = known[names].grad
            rows[index] = 0.0 if gradient is None else _whole(gradient)[0]
    found.figures["gradients"] = rows


def _weights(found: Measured, subject: Specimen, made: Deal) -> None:
    known = parameters(subject.module)
    rows = np.full((len(made.slots), 1 + PROJECTIONS), np.nan)
    for index, names in enumerate(made.holders):
        if names is not None and known[names].numel():
            rows[index] = _whole(known[names])[0]
    found.figures["weights"] = rows


def _greedy(found: Measured, subject: Specimen, tokens: NDArray[np.int64]) -> None:
    import torch

    from lmconform.measuring.generating import Generator
    from lmconform.specimen import Unavailable

    ids = _ids(subject, tokens[:, :PROMPT])
    new = NEW if subject.context_length is None else max(1, min(NEW, subject.context_length - ids.shape[1]))
    made: Tensor | None = None
    if subject.can("gen"):
        try:
            made = Generator(subject).greedy(ids, new)
        except Unavailable:
            made = None
    if made is None:  # no generate(), or none that can be asked for the likeliest token
        whole = ids
        for _ in range(new):
            whole = torch.cat([whole, subject.logits(whole)[:, -1:].argmax(-1)], dim=1)
        made = whole[:, ids.shape[1] :]
    found.greedy = made.detach().cpu().numpy().astype(np.int64)


# -- with its noise ----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """One key of a snapshot. `values` [rows, columns], `scale` [rows], and what rounding does to each row, absolute:
    `exact` as the subject computes now, `single` if every operation were rounded to float32."""

    values: NDArray[np.float64]
    scale: NDArray[np.float64]
    exact: NDArray[np.float64]
    single: NDArray[np.float64]


@dataclass
class Fingerprint:
    """What a snapshot holds of behaviour. `stable` [rows] is how many greedy tokens rounding never changed."""

    keys: dict[str, Figures]
    places: dict[str, list[str]]
    greedy: NDArray[np.int64] | None
    stable: list[int]
    missing: dict[str, str]


def fingerprint(subject: Specimen, tokens: Tokens, made: Deal, *, seed: int, as_loaded: bool) -> Fingerprint:
    """Measure, and measure what rounding does to each figure. Raises SnapshotError where equal calls differ."""

    def once(noise: Noise | None = None, luck: int = 0) -> Measured:
        return measure(subject, tokens, made, seed=seed, as_loaded=as_loaded, noise=noise, luck=luck)

    base, again = once(), once(luck=1)
    if "batch" in base.missing:
        raise SnapshotError(f"{subject.name}: forward() {base.missing['batch']}")
    for case in [key.partition("/")[0] for key, values in base.figures.items() if broken(values)]:
        if case == "batch":
            raise SnapshotError(f"{subject.name}: forward() gives NaN or infinity; lmconform check says where")
        base.missing[case] = "gives NaN or infinity"
        base.figures = {key: values for key, values in base.figures.items() if key.partition("/")[0] != case}
    for key, values in base.figures.items():
        differs = np.abs(values - again.figures[key])
        if bool((differs > REPEATABLE * scale_of(values)[:, None]).any()):
            raise SnapshotError(
                f"{subject.name}: two equal calls give different {key.partition('/')[2] or key}, so there is nothing "
                "to compare with later; lmconform check SPEC --select contract.repeatable"
            )
    noisy = {single: [once(Noise(run, single)) for run in range(1, count + 1)] for single, count in RUNS.items()}
    keys = {}
    for key, values in base.figures.items():
        spread = {single: _spread(values, [run.figures.get(key) for run in runs]) for single, runs in noisy.items()}
        keys[key] = Figures(values, scale_of(values), spread[False], np.maximum(spread[True], spread[False]))
    return Fingerprint(keys, base.places, base.greedy, _stable(base.greedy, noisy[True]), base.missing)


def broken(values: NDArray[np.float64]) -> bool:
    """Whether a row holds a number that is none; a row of NaN alone is a parameter without floating numbers."""
    return not bool(np.isfinite(values[~np.isnan(values).all(-1)]).all()) or bool(np.isnan(values).all())


def scale_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The size of each row: its RMS column, or its largest figure, whichever is larger."""
    size = np.abs(np.nan_to_num(values)).max(-1)
    return np.asarray(np.maximum(size, 1e-300))


def _spread(values: NDArray[np.float64], others: list[NDArray[np.float64] | None]) -> NDArray[np.float64]:
    """The furthest that any run moved each row; infinite where a run gave none."""
    if any(other is None or other.shape != values.shape for other in others):
        return np.full(len(values), np.inf)
    moved = np.stack([np.abs(other - values).max(-1) for other in others if other is not None])
    return np.asarray(np.where(np.isnan(moved), 0.0, moved).max(0))


def _stable(tokens: NDArray[np.int64] | None, runs: list[Measured]) -> list[int]:
    if tokens is None:
        return []
    stable = []
    for row in range(tokens.shape[0]):
        least = tokens.shape[1]
        for run in runs:
            if run.greedy is None or run.greedy.shape != tokens.shape:
                return [0] * tokens.shape[0]
            off = np.flatnonzero(run.greedy[row] != tokens[row])
            least = min(least, int(off[0]) if len(off) else least)
        stable.append(least)
    return stable
