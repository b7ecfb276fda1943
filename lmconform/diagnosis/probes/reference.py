"""What would make the subject equal to its reference? Each remedy is tried on a copy, and the logits compared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.diagnosis.probes import substitution
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring import traces
from lmconform.measuring.head_sharing import dealt_otherwise
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

WEIGHTS = ("weights.not_loaded", "weights.sliced_wrong", "attention.heads_scrambled", "position.offset")
CODE = (
    "norm.epsilon", "activation.differs", "position.layout", "position.rates", "position.base_kept",
    "attention.kv_groups",
    "attention.unscaled", "scale.hidden", "scale.logits",
)  # fmt: skip
QUERY = re.compile(r"(^|[._])q(uery)?(_proj|_lin)?$")
KEY = re.compile(r"(^|[._])k(ey)?(_proj|_lin)?$")
OUT = re.compile(r"(^|[._])(o|out|dense)(_proj|_lin)?$")
MOST = 24  # kinds of fused weights that are tried
CAPPED = 0.05  # of the largest: how far a soft cap may bend logits that are otherwise a multiple of the reference's
EPSILONS = ("eps", "variance_epsilon", "layer_norm_epsilon")


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """The reference's weights, its norms' epsilon, other activations, layouts and head orders, one at a time."""
    import torch

    theirs = subject.reference
    if theirs is None or theirs.vocab_size != subject.vocab_size:
        raise Unavailable("no reference of this vocabulary")
    ordinary = sorted(set(subject.ordinary_ids) & set(theirs.ordinary_ids))
    ids = random_ids(ordinary, 2, min(subject.longest(24), theirs.longest(24)), torch.Generator().manual_seed(seed))
    expected = theirs.logits(ids.to(theirs.device)).cpu()
    ours = subject.as_loaded()
    bound = tolerance.allowed(max(ours.noise, theirs.noise), expected)

    def distance(specimen: Specimen) -> float:
        return float((specimen.logits(ids.to(specimen.device)).cpu() - expected).abs().max())

    def error(specimen: Specimen) -> float:
        """Of a remedy: one that does not fit into the model, and raises, is none."""
        try:
            return distance(specimen)
        except Exception:
            return math.inf

    before = distance(ours)
    if before <= bound:
        return []

    def cured(after: float) -> bool:
        return after <= bound

    changed = _unlike(ours.module, theirs.module)
    if changed is not None:
        copied = ours.copy()
        _load(copied.module, theirs.module)
        after = error(copied)
        if changed and cured(after):
            where = f"{changed[0]}; with the reference's weights the logits agree to {after:.2g}"
            likely = _how(ours.module, theirs.module, changed[0])
            others = [cause for cause in (*WEIGHTS, *CODE) if cause != likely]
            return [Finding(likely, Verdict.cured, where), *(Finding(cause, Verdict.against) for cause in others)]
    found: list[Finding] = []
    if changed == []:  # the same weights in every place: the code differs
        found.append(Finding("weights.not_loaded", Verdict.ruled_out))
        found += [Finding(cause, Verdict.against) for cause in WEIGHTS if cause != "weights.not_loaded"]
    for cause, what, remedies in _remedies(ours, theirs, ids):
        for remedy, context in remedies:
            copied = ours.copy()
            if not remedy(copied.module):
                continue
            with context():
                after = error(copied)
            if cured(after):
                where = f"with {what} the logits agree to {after:.2g} in place of {before:.2g}"
                found.append(Finding(cause, Verdict.cured, where))
                return found + [Finding(other, Verdict.against) for other in CODE if other != cause]
    if changed == []:
        if (cut := _cut_otherwise(ours, error, bound)) is not None:
            rest = (cause for cause in (*WEIGHTS, *CODE) if cause != cut.cause)
            return [cut, *(Finding(other, Verdict.against) for other in rest)]
        told = (
            substitution.settings(ours, theirs, error, bound)
            or substitution.modules(ours, theirs, error, bound)
            or substitution.scores(ours, theirs, ids, error, bound)
        )
        if told is not None:
            alike = substitution.ALIKE.get(told.cause, ())
            found += [told, *(Finding(other, told.verdict, told.where) for other in alike)]
            gone = substitution.EXCLUDED.get(told.cause, ()) if told.verdict == Verdict.cured else ()
            found += [Finding(other, Verdict.ruled_out) for other in gone]
            cleared = (other for other in CODE if other not in (told.cause, *alike, *gone))
            return [*found, *(Finding(other, Verdict.against) for other in cleared)]
    return found + _by_shape(ours, theirs, ids)


# -- weights ---------------------------------------------------------------------------------------------------------


def _unlike(ours: nn.Module, theirs: nn.Module) -> list[str] | None:
    """Names of weights that differ; None where the two do not have the same names and shapes."""
    import torch

    mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    if any(name not in mine or mine[name].shape != weight.shape for name, weight in given.items()):
        return None
    return [name for name, weight in given.items() if not torch.equal(mine[name].cpu(), weight.cpu().to(mine[name]))]


def _load(ours: nn.Module, theirs: nn.Module) -> None:
    import torch

    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            mine[name].copy_(weight)


def _how(ours: nn.Module, theirs: nn.Module, name: str) -> str:
    """What happened to that weight: turned, cut elsewhere, its rows in another order, or not there at all."""
    import torch

    mine, right = ours.get_parameter(name).detach().cpu(), theirs.get_parameter(name).detach().cpu().to(torch.float32)
    mine = mine.to(torch.float32)
    if mine.dim() < 2:
        return "weights.not_loaded"
    if mine.shape == right.T.shape and torch.equal(mine, right.T):
        return "weights.sliced_wrong"
    rows, columns = _shared(mine, right), _shared(mine.T, right.T)
    if rows == 1.0 and mine.shape[0] != mine.shape[1] and "emb" not in name and QUERY.search(name.rpartition(".")[0]):
        return "attention.heads_scrambled"
    if rows == 1.0:
        owner = ours.get_submodule(name.rpartition(".")[0])
        return "position.offset" if isinstance(owner, torch.nn.Embedding) else "attention.heads_scrambled"
    return "weights.sliced_wrong" if max(rows, columns) > 0.5 else "weights.not_loaded"


def _shared(left: Tensor, right: Tensor) -> float:
    """The share of rows of `left` that are rows of `right`."""
    known = {row.numpy().tobytes() for row in right.contiguous()}
    return sum(row.numpy().tobytes() in known for row in left.contiguous()) / len(left)


# -- remedies --------------------------------------------------------------------------------------------------------

Remedy = tuple[Callable[["nn.Module"], bool], Callable[[], AbstractContextManager[Any]]]


def _remedies(ours: Specimen, theirs: Specimen, ids: Tensor) -> Iterator[tuple[str, str, list[Remedy]]]:
    same_eps: Remedy = (lambda m: _same_eps(m, theirs.module), nullcontext)
    yield "norm.epsilon", "the reference's epsilon in every norm", [same_eps]
    calls = _gelu_calls(ours)
    gelus: list[Remedy] = [(_as_it_is, partial(other_gelu, at)) for at in (None, *range(calls))] if calls else []
    yield "activation.differs", "the other form of GELU", gelus
    layers = [None, *range(len(_attentions(ours.module)))]
    turns: list[Remedy] = [
        (partial(_regroup, at=at, to_neighbours=to), nullcontext) for at in layers for to in (True, False)
    ]
    yield "position.layout", "the rows of q and k in the other rotary layout", turns
    if (regrouped := dealt_otherwise(ours, theirs, ids)) is not None:
        yield "attention.kv_groups", regrouped.text, [(_as_it_is, regrouped.applied)]
    deals: list[Remedy] = [(partial(_deal, at=at), nullcontext) for at in layers]
    yield "attention.kv_groups", "query heads dealt out to key heads in runs", deals


def _as_it_is(module: nn.Module) -> bool:
    return True


def _same_eps(ours: nn.Module, theirs: nn.Module) -> bool:
    def norms(module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(m, key) for m in module.modules() for key in EPSILONS if isinstance(getattr(m, key, None), float)]

    mine, given = norms(ours), norms(theirs)
    if len(mine) != len(given):
        return False
    changed = False
    for (module, key), (other, name) in zip(mine, given):
        if getattr(module, key) != getattr(other, name):
            setattr(module, key, getattr(other, name))
            changed = True
    return changed


def _gelu_calls(subject: Specimen) -> int:
    """How often one forward calls F.gelu."""
    with other_gelu(-1) as calls:
        subject.logits(subject.probe_ids())
    return calls[0]


@contextmanager
def other_gelu(at: int | None) -> Iterator[list[int]]:
    """Within it, F.gelu computes its tanh approximation where the exact form is asked for, and the other way round.

    In every call, or in call `at` alone; gives the count of calls.
    """
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    calls = [0]

    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is F.gelu:
                if at in (None, calls[0]):
                    kwargs["approximate"] = "none" if kwargs.get("approximate", "none") == "tanh" else "tanh"
                calls[0] += 1
            return func(*args, **kwargs)

    with Other():
        yield calls


def _cut_otherwise(ours: Specimen, error: Callable[[Specimen], float], bound: float) -> Finding | None:
    """Whether a fused weight is cut into halves where two parts lie in turn, or the other way round."""
    import torch

    copied = ours.copy()
    groups: dict[tuple[str, int], list[tuple[str, Tensor, int]]] = {}
    for name, weight in copied.module.named_parameters():
        owner = re.sub(r"\d+", "#", name.rpartition(".")[0])
        for axis, size in enumerate(weight.shape):
            if size >= 4 and size % 2 == 0 and tuple(weight.shape).count(size) == 1:
                groups.setdefault((owner, size), []).append((name, weight, axis))
    fused = [(size, parts) for (_, size), parts in groups.items() if any(weight.dim() > 1 for _, weight, _ in parts)]
    for size, parts in sorted(fused, key=lambda group: -group[0])[:MOST]:
        for shape, held in (((2, -1), "halves"), ((-1, 2), "turns")):
            order = torch.arange(size).view(shape).T.flatten()
            kept = [weight.detach().clone() for _, weight, _ in parts]
            with torch.no_grad():
                for _, place, axis in parts:
                    place.copy_(place.index_select(axis, order.to(place.device)))
                after = error(copied)
                for (_, place, _), before in zip(parts, kept):
                    place.copy_(before)
            if after <= bound:
                name = next(name for name, weight, _ in parts if weight.dim() > 1)
                lie = f"its {size} entries lie in {held} and are read in {'turns' if held == 'halves' else 'halves'}"
                where = f"{name}: {lie}; with them moved the logits agree to {after:.2g}"
                return Finding("weights.sliced_wrong", Verdict.cured, where)
    return None


def _attentions(module: nn.Module) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    """Query, key and output projections, layer by layer."""
    import torch

    named = [(name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    queries = [part for name, part in named if QUERY.search(name)]
    keys = [part for name, part in named if KEY.search(name)]
    outs = [part for name, part in named if OUT.search(name)]
    return list(zip(queries, keys, outs)) if len(queries) == len(keys) == len(outs) else []


def _heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    return next((n for n in (getattr(config, k, None) for k in ("num_attention_heads", "n_head", "heads")) if n), None)


def _regroup(module: nn.Module, at: int | None, to_neighbours: bool) -> bool:
    """Rows of q and k of one layer (None: all) from halves to neighbours, or back."""
    import torch

    found, heads = _attentions(module), _heads(module)
    if not found or not heads:
        return False
    with torch.no_grad():
        for query, key, _ in found if at is None else [found[at]]:
            size = query.out_features // heads
            if size % 2 or key.out_features % size:
                return False
            order = torch.arange(size).view(2, -1).T.flatten() if to_neighbours else torch.arange(size).view(-1, 2).T
            for layer in (query, key):
                for tensor in (layer.weight, layer.bias):
                    if tensor is not None:
                        parts = tensor.unflatten(0, (-1, size))
                        tensor.copy_(parts[:, order.flatten()].flatten(0, 1).clone())
    return True


def _deal(module: nn.Module, at: int | None) -> bool:
    """Reorder query heads (and the columns of the output) so that dealing keys out in turn gives runs."""
    import torch

    found, heads = _attentions(module), _heads(module)
    if not found or not heads:
        return False
    with torch.no_grad():
        for query, key, out in found if at is None else [found[at]]:
            size = query.out_features // heads
            groups = key.out_features // size
            if groups in (0, 1, heads) or heads % groups or out.in_features != query.out_features:
                return False
            run = heads // groups
            order = torch.tensor([(place % groups) * run + place // groups for place in range(heads)])
            for tensor in (query.weight, query.bias):
                if tensor is not None:
                    tensor.copy_(tensor.unflatten(0, (heads, size))[order].flatten(0, 1).clone())
            out.weight.copy_(out.weight.unflatten(1, (heads, size))[:, order].flatten(1, 2).clone())
    return True


# -- the shape of the difference -------------------------------------------------------------------------------------


def _by_shape(ours: Specimen, theirs: Specimen, ids: Tensor) -> list[Finding]:
    """A factor between the two, or something added by position: read off the first state that differs."""
    mine, right = traces.stream(ours, ids.to(ours.device)), traces.stream(theirs, ids.to(theirs.device))
    if mine is None or right is None or len(mine.states) != len(right.states):
        return []
    pairs = [*zip(mine.names, mine.states, right.states), ("the logits", mine.logits, right.logits)]
    for name, left, other in pairs:
        if left.shape != other.shape:
            return []
        left, other = left.cpu().double(), other.cpu().double()
        size = float(other.abs().max())
        if float((left - other).abs().max()) <= 1e-5 * size:
            continue
        factor = float((left * other).sum() / other.square().sum())
        logits = name == "the logits"
        slack, least = (CAPPED, 4 * CAPPED) if logits else (1e-4, 1e-3)
        if float((left - factor * other).abs().max()) <= slack * abs(factor) * size and abs(factor - 1) > least:
            cause = "scale.logits" if logits else "scale.hidden"
            found = [Finding(cause, Verdict.seen, f"{name}: {factor:.4g} times the reference's in every place")]
            return found + [Finding(c, Verdict.against) for c in CODE if c != cause]
        added = left - other
        if float((added - added[:1]).abs().max()) <= 1e-4 * float(added.abs().max()):
            where = f"{name}: what is added depends on the position and not on the token"
            return [Finding("position.base_kept", Verdict.seen, where), Finding("scale.hidden", Verdict.against)]
        return [Finding("scale.hidden", Verdict.against), Finding("scale.logits", Verdict.against)]
    return []
