"""contract: what a call leaves behind, and what it does with input that is not legal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.cases import Choice
from lmconform.checks.first_block import constant_inputs
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.generating import Generator
from lmconform.outputs import ConventionError, shapes
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

TABLE_MARGIN = 16  # rows that a position table may have beyond the stated context (OPT has 2, fairseq pads to 8)
EXPLAINING = ("vocab", "token", "length", "context", "position", "empty", "exceed", "dtype", "float", "long")


@register_check(
    "contract.inputs_untouched",
    holds="tensors (and tuple caches) given by the caller are unchanged after the call",
    profile="smoke",
    space={"given": Choice("ids", "mask", "positions", "labels", "embeds", "cache")},
    grid=tuple({"given": given} for given in ("ids", "mask", "positions", "labels", "embeds", "cache")),
)
def check_inputs_untouched(subject: Specimen, ctx: Context) -> None:
    """Every input compared with its clone, and its version counter: a write of equal values is a write.

    The inputs hold what tempts a model to write: padding in ids and mask, padding and -100 in labels. Cache objects
    are mutable by convention; a cache that is a tuple of tensors is not.
    """
    for case in ctx.cases():
        for given in _calls(subject, ctx, case.given):
            before = {name: _Snapshot(tensor, tensor.clone(), tensor._version, tensor.requires_grad)
                      for name, tensor in _leaves(given)}  # fmt: skip
            train = case.given == "labels"
            others = {key: value for key, value in given.items() if key != "ids"}
            try:
                subject.forward(given.get("ids"), **others, train=train)
            except Exception as error:  # whether the input works is for its own family to say
                ctx.note(f"a call with {', '.join(others) or 'ids'} raised {type(error).__name__}")
            for name, snapshot in before.items():
                if change := snapshot.change():
                    suspects = ["inputs.mutated", "cache.mutated_in_place"]
                    if "cache" in name:
                        suspects.reverse()
                    ctx.fail(
                        f"the caller's {name} {change}",
                        where="train mode" if train else "",
                        hint=Hint(
                            "an in-place operation (masked_fill_, x[...] = ..., +=) on an argument of forward(): "
                            "clone it first",
                            *suspects,
                        ),
                    )


@dataclass
class _Snapshot:
    tensor: Tensor
    values: Tensor
    version: int
    requires_grad: bool

    def change(self) -> str:
        """What became of the tensor, in words; empty where nothing did."""
        if self.tensor.shape != self.values.shape:
            return f"changed shape from {list(self.values.shape)} to {list(self.tensor.shape)}"
        changed = (self.tensor != self.values) & ~(self.tensor.isnan() & self.values.isnan())
        if bool(changed.any()):
            place = changed.nonzero()[0].tolist()
            return f"changed in {int(changed.sum())} of {changed.numel()} places during the call, first at {place}"
        if self.tensor._version != self.version:
            return "was written to in place during the call (with equal values, this time)"
        if self.tensor.requires_grad != self.requires_grad:
            return f"had requires_grad set to {self.tensor.requires_grad}"
        return ""


def _calls(subject: Specimen, ctx: Context, given: str) -> Iterator[dict[str, Any]]:
    """Inputs for each call that shows what happens to `given`; none where the model does not take it."""
    import torch

    convention = subject.convention
    time = subject.longest(12)
    ids = ctx.ids(2, time)
    padded = torch.ones_like(ids)
    padded[0, : time // 2] = 0
    pad = structure.special_ids(subject.module).get("pad_token_id")
    if pad is not None and pad < subject.vocab_size:
        ids = torch.where(padded.bool(), ids, torch.full_like(ids, pad))
    if given == "ids":
        yield {"ids": ids}
    elif given == "mask" and convention.mask is not None:
        yield {"ids": ids, "mask": padded}
        yield {"ids": ids, "mask": torch.ones_like(ids)}
    elif given == "positions" and convention.positions is not None:
        yield {"ids": ids, "positions": torch.arange(time, device=ids.device).repeat(2, 1)}
    elif given == "labels" and convention.labels is not None:
        labels = ids.clone()
        if convention.labels_shifted:
            labels[1, : time // 3] = -100
        yield {"ids": ids, "labels": labels}
    elif given == "embeds" and subject.can("embeds") and _looks_up(subject):
        yield {"embeds": subject.embed(ids).detach().clone()}
    elif given == "cache" and subject.can("cache"):
        cache = subject.forward(ids[:, :-3], use_cache=True).cache
        if isinstance(cache, tuple) and next(_leaves({"cache": cache}), None) is not None:
            yield {"ids": ids[:, -3:], "cache": cache, "use_cache": True}


def _looks_up(subject: Specimen) -> bool:
    """Whether the token embedding can be called: several code streams have a list of tables."""
    from torch import nn

    return not isinstance(structure.embedding(subject.module, subject.vocab_size), nn.ModuleList)


def _leaves(given: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts, tuples and lists, each with a name a user can find."""
    import torch

    names = {"ids": "input ids", "mask": "attention mask", "positions": "position ids", "embeds": "input embeddings"}
    if isinstance(given, torch.Tensor):
        yield name, given
    elif isinstance(given, dict):
        for key, value in given.items():
            yield from _leaves(value, names.get(key, str(key)))
    elif isinstance(given, tuple | list):
        for index, value in enumerate(given):
            yield from _leaves(value, f"{name}[{index}]")


@register_check(
    "contract.mode_kept",
    holds="train/eval mode, RNG state in eval, requires_grad, grad mode and default dtype are as before the call; "
    "train/eval mode after generate(), too",
    profile="smoke",
    space={"mode": Choice("eval", "train", "mixed", "no_grad", "generate_eval", "generate_train")},
    grid=tuple({"mode": mode} for mode in ("eval", "train", "mixed", "no_grad", "generate_eval", "generate_train")),
)
def check_mode_kept(subject: Specimen, ctx: Context) -> None:
    """All in eval, all in train, and every second submodule in eval (a frozen part): each must stay as it was."""
    import random

    import numpy
    import torch

    copied = subject.copy()
    module = copied.module
    ids = ctx.ids(2, subject.longest(12))
    frozen = next(iter(module.parameters()), None)
    found_dtype, found_random = torch.get_default_dtype(), (random.getstate(), numpy.random.get_state())
    # an earlier call may already have left its mark: start from a default of our own
    dtype = torch.float64 if subject.dtype == torch.float64 else torch.float32
    for case in ctx.cases():
        if case.mode.startswith("generate"):
            _check_generate_keeps_mode(copied, ctx, train=case.mode == "generate_train")
            continue
        module.train(case.mode in ("train", "mixed"))
        if case.mode == "mixed":
            for part in list(module.modules())[1::2]:
                part.training = False
        if frozen is not None:
            frozen.requires_grad_(case.mode != "mixed")
        modes = {name: part.training for name, part in module.named_modules()}
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        grad = case.mode != "no_grad"
        torch.rand(3), random.random(), numpy.random.random()  # away from where a fixed seed would lead
        states = _random_states()
        torch.set_default_dtype(dtype)
        try:
            with torch.set_grad_enabled(grad):
                copied.convention.run(module, ids)
                left_grad = torch.is_grad_enabled()
            left_dtype, left_states = torch.get_default_dtype(), _random_states()
        finally:
            torch.set_default_dtype(found_dtype)
            random.setstate(found_random[0])
            numpy.random.set_state(found_random[1])
        now = dict(module.named_modules())
        if switched := [name for name, mode in modes.items() if name in now and now[name].training != mode]:
            was = "train" if modes[switched[0]] else "eval"
            ctx.fail(
                f"a forward switched {len(switched)} of {len(modes)} modules out of {was} mode",
                where=switched[0] or "the model itself",
                hint=Hint("eval() or train() is called inside forward() and not undone", "mode.not_restored"),
            )
        if moved := [n for n, p in module.named_parameters() if trained.get(n, p.requires_grad) != p.requires_grad]:
            ctx.fail(
                f"a forward changed requires_grad of {len(moved)} parameters",
                where=moved[0],
                hint=Hint("requires_grad_() is called inside forward()", "mode.not_restored"),
            )
        if left_grad != grad:
            ctx.fail(
                f"a forward left gradients switched {'on' if left_grad else 'off'}",
                hint=Hint(
                    "torch.set_grad_enabled() is called as a function inside forward(): use it as a context",
                    "mode.not_restored",
                ),
            )
        if left_dtype != dtype:
            ctx.fail(
                f"a forward changed the default dtype from {dtype} to {left_dtype}",
                hint=Hint("torch.set_default_dtype() inside forward() is never set back", "mode.not_restored"),
            )
        if case.mode in ("eval", "no_grad"):
            for name in (name for name in states if states[name] != left_states[name]):
                ctx.fail(
                    f"a forward in eval mode moved {name} global random state",
                    hint=Hint(
                        "random numbers are drawn, or a seed is set, in forward(): draw only in training, "
                        "from a generator of its own",
                        "mode.not_restored",
                        "dropout.in_eval",
                    ),
                )


def _check_generate_keeps_mode(copied: Specimen, ctx: Context, *, train: bool) -> None:
    if not copied.can("gen"):
        return
    module = copied.module
    try:
        generator = Generator(copied, mode_as_found=True)
        ids = ctx.ids(2, copied.longest(8) - 2)  # may run the model, in eval mode, to find its context
        module.train(train)
        modes = {name: part.training for name, part in module.named_modules()}
        generator.as_users_call(ids, 2, sample=False)
    except Exception:  # what generate() cannot do is for the family generation to say
        return
    if switched := [name for name, part in module.named_modules() if modes.get(name, part.training) != part.training]:
        was, now = ("train", "eval") if train else ("eval", "train")
        ctx.fail(
            f"generate() switched {len(switched)} of {len(modes)} modules from {was} to {now} mode",
            where=switched[0] or "the model itself",
            hint=Hint(
                "it calls eval() before and train() after, whatever was before, or never undoes one of them: a sample "
                "drawn while training or evaluating leaves dropout off or on. Keep self.training first and end with "
                "self.train(kept), or leave the mode to the caller",
                "mode.not_restored",
            ),
        )


def _random_states() -> dict[str, bytes]:
    import pickle
    import random

    import numpy
    import torch

    return {
        "torch's": torch.get_rng_state().numpy().tobytes(),
        "Python's": pickle.dumps(random.getstate()),
        "numpy's": pickle.dumps(numpy.random.get_state()),
    }


BAD = ("id_too_large", "id_negative", "float_ids", "empty", "too_long")


@register_check(
    "contract.bad_input",
    holds="illegal ids, empty time or too many positions raise a Python exception or are declared legal (CPU)",
    profile="smoke",
    space={"kind": Choice(*BAD)},
    grid=tuple({"kind": kind} for kind in BAD),
)
def check_bad_input(subject: Specimen, ctx: Context) -> None:
    """Never silent garbage: an exception, or a meaning that can be stated.

    Legal without an exception: ids that the embedding table has rows for, logits [batch, 0, vocab] for no tokens,
    more tokens than the stated context where no position table ends (rotary, relative, recurrent). An exception that
    does not say what was wrong is noted.
    """
    copied = subject.lent()  # an exception in the middle of a call may leave state behind
    copied.module.to("cpu")  # a bad index on CUDA ends the whole process
    obscure: list[str] = []
    for case in ctx.cases():
        attempt = _ATTEMPTS[case.kind](copied, ctx)
        if attempt is None:
            continue
        what, call, judge, hint = attempt
        try:
            logits = call()
        except ConventionError as error:
            ctx.fail(f"{what} raised nothing and gave no logits either: {first_line(error)}", hint=hint)
        except Exception as error:
            text = f"{type(error).__name__}: {first_line(error)}"
            if not any(word in text.lower() for word in EXPLAINING):
                obscure.append(f"{what}: {text}")
        else:
            if reproach := judge(logits):
                ctx.fail(f"{what} raised nothing: {reproach}", hint=hint)
    if obscure:
        ctx.note("exceptions that do not say what is wrong: " + "; ".join(obscure))


Attempt = tuple[str, Callable[[], "Tensor"], Callable[["Tensor"], str], str]


def _garbage(logits: Tensor) -> str:
    return f"it returned logits {list(logits.shape)} as if nothing were wrong"


def _id_too_large(subject: Specimen, ctx: Context) -> Attempt:
    ids = ctx.ids(1, 4).cpu()
    rows = max([subject.vocab_size, *_rows_for(subject, ids)])  # padded tables, a start token: rows are legal ids
    ids[0, 1] = rows
    what = f"token id {rows} (the vocabulary ends at {rows - 1})"
    hint = Hint(
        "ids are clamped or taken modulo the vocabulary: an off-by-one in the tokenizer or its size stays unseen",
        "contract.bad_input_accepted",
    )
    return what, lambda: subject.logits(ids), _garbage, hint


def _rows_for(subject: Specimen, ids: Tensor) -> list[int]:
    """Rows of the tables that a forward looks these very ids up in."""
    import torch

    rows: list[int] = []

    def looked_up(module: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0].flatten() if args and isinstance(args[0], torch.Tensor) else None
        if given is not None and torch.equal(given[-ids.numel() :].long(), ids.flatten()):  # a prompt may come before
            rows.append(int(getattr(module, "num_embeddings", 0)))

    tables = [part for part in subject.module.modules() if isinstance(part, torch.nn.Embedding)]
    hooks = [table.register_forward_pre_hook(looked_up) for table in tables]
    try:
        subject.logits(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _id_negative(subject: Specimen, ctx: Context) -> Attempt:
    ids = ctx.ids(1, 4).cpu()
    ids[0, 1] = -1
    hint = Hint(
        "weight[ids] counts negative ids from the end of the table: use F.embedding, or reject ids below 0",
        "contract.bad_input_accepted",
    )
    return "token id -1", lambda: subject.logits(ids), _garbage, hint


def _float_ids(subject: Specimen, ctx: Context) -> Attempt:
    ids = ctx.ids(1, 4).cpu().float() + 0.5
    hint = Hint(
        "ids are cast with .long(), which cuts the fraction off: reject ids that are not integers",
        "contract.bad_input_accepted",
    )
    return f"float token ids such as {float(ids[0, 0])}", lambda: subject.logits(ids), _garbage, hint


def _empty(subject: Specimen, ctx: Context) -> Attempt:
    ids = ctx.ids(2, 4).cpu()[:, :0]

    def judge(logits: Tensor) -> str:
        if list(logits.shape) == [2, 0, subject.vocab_size]:
            return ""
        return f"it returned {shapes(logits)}, expected an exception or [2, 0, {subject.vocab_size}]"

    return (
        "a sequence of no tokens",
        lambda: subject.logits(ids),
        judge,
        Hint("an empty prompt is padded up without a word", "contract.bad_input_accepted"),
    )


def _too_long(subject: Specimen, ctx: Context) -> Attempt | None:
    """Only where positions are told apart before the first block: there a table ends."""
    import torch

    context = subject.context_length
    if context is None or context > 4096:
        return None
    try:
        within = constant_inputs(subject, context)
    except Exception as error:
        ctx.note(f"the stated context of {context} tokens is not taken ({type(error).__name__}), let alone more")
        return None
    if within is None or not _positions_differ(within):
        return None
    time = context + TABLE_MARGIN + 1
    ids = ctx.ids(1, 2).cpu()[:, :1].expand(1, time).contiguous()

    def judge(logits: Tensor) -> str:
        received = constant_inputs(subject, time)
        if received is None or received.shape[0] != time:
            return ""
        distance = torch.cdist(received.double(), received.double()).fill_diagonal_(torch.inf)
        distance = distance.masked_fill(torch.arange(time)[None].expand(time, time) < context, torch.inf)
        if float(distance.min()) > 1e-6 * float(received.abs().max()):
            return ""  # every further position has an encoding of its own: computed, or a table with room
        one, other = sorted(divmod(int(distance.argmin()), time))
        return f"position {other}, beyond the context of {context}, gets the encoding of position {one}"

    hint = Hint(
        "positions are clamped, or taken modulo the table: raise for more tokens than the table has rows",
        "contract.bad_input_accepted",
        "position.collision",
    )
    return f"{time} tokens, more than the context of {context},", lambda: subject.logits(ids), judge, hint


def _positions_differ(received: Tensor) -> bool:
    return bool((received - received[:1]).abs().max() > 1e-6 * received.abs().max())


_ATTEMPTS: dict[str, Callable[[Any, Any], Attempt | None]] = {
    "id_too_large": _id_too_large,
    "id_negative": _id_negative,
    "float_ids": _float_ids,
    "empty": _empty,
    "too_long": _too_long,
}
