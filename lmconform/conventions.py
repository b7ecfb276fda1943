"""How a model's forward() is called and read, found out by trying.

Nothing here is declared by the model: names come from the signature of forward(), and each guess is confirmed by a
call on a few tokens.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.adapters import shipped_for
from lmconform.advice import advice
from lmconform.outputs import CACHE, ConventionError, Output, expect_logits, lone_loss, read

if TYPE_CHECKING:
    from torch import Tensor, nn

IDS = ("input_ids", "idx", "tokens", "ids", "token_ids", "x", "input", "inputs")
MASK = ("attention_mask", "mask", "attn_mask", "padding_mask")
ANY_MASK = ("mask", "attn_mask", "padding_mask")  # may be the causal mask [time, time], or 1 where padding is
IGNORED = -100  # the label that does not count, torch's and Hugging Face's default
SAME = 0.05  # of the logits' spread: below lies rounding, also of half types, or a fault that checks must see
POSITIONS = ("position_ids", "positions", "pos", "input_pos")
USE_CACHE = ("use_cache", "return_cache")
EMBEDS = ("inputs_embeds", "input_embeds", "embeds")
LABELS = ("labels", "targets", "target", "y", "target_ids", "target_seq")
ANY_LABELS = ("target", "y")  # may be something that the text is conditioned on
FILLED = {  # what is given where forward() requires it: its size beside a cache is not known
    "attention_mask": "ones",
    "position_ids": "places", "positions": "places", "pos": "places", "input_pos": "places",
    "start_pos": "zero", "start_position": "zero", "position_offset": "zero",
    **dict.fromkeys(CACHE, "none"),
}  # fmt: skip
HIDDEN = ("output_hidden_states",)
ATTENTIONS = ("output_attentions",)


@dataclass(frozen=True)
class Convention:
    """The names under which forward() takes its inputs; None where it takes no such thing.

    `labels_shifted`: the model shifts labels itself (Hugging Face's `labels`); a `targets` argument (nanoGPT) is
    compared with the logits as it stands. `targets_for_logits`: logits of every position come only with targets.
    `loss_alone`: with labels it gives the loss and no logits (nanochat); `kept_loss`: the attribute in which it leaves
    the loss (llama2.c). `filled`: what it requires and is given by rule, each name with a word of `FILLED`.
    `mask_is_bool`: it wants the padding mask as bool. `mask_refusal`: why an argument called mask is no padding mask
    [batch, time] of 1 and 0; `positions_refusal`, `labels_refusal`: why one called like positions or labels takes none.
    """

    ids: str | None
    mask: str | None = None
    positions: str | None = None
    cache: str | None = None
    use_cache: str | None = None
    embeds: str | None = None
    labels: str | None = None
    labels_shifted: bool = True
    hidden_states: str | None = None
    attentions: str | None = None
    targets_for_logits: bool = False
    loss_alone: bool = False
    kept_loss: str = ""
    filled: tuple[tuple[str, str], ...] = ()
    mask_is_bool: bool = False
    mask_refusal: str = ""
    positions_refusal: str = ""
    labels_refusal: str = ""
    call: Callable[..., Any] | None = field(default=None, compare=False)

    def describe(self) -> str:
        """For example: forward(idx, targets=...) -> logits, loss."""
        if self.call is not None:
            return f"call() in {_home(self.call)}"
        taken = [
            value
            for key in ("ids", "mask", "positions", "cache", "embeds", "labels")
            if (value := getattr(self, key)) is not None
        ]
        return f"forward({', '.join(taken) or 'ids'})"

    def run(self, module: nn.Module, input_ids: Tensor | None, **inputs: Any) -> Output:
        """Call the model once. `inputs` are fields of this convention (mask=..., cache=..., labels=...).

        Ids and labels are handed over contiguous, as data loaders do: many a loss calls view(-1) on them. Logits that
        come flattened with labels, [batch * time, vocab], are given back as [batch, time, vocab]. Where labels give the
        loss alone, the logits are those of a second call without them, which draws the same random numbers.

        Raises ConventionError when the model takes no such input or gives no logits.
        """
        if input_ids is not None:
            input_ids = input_ids.contiguous()
        keywords = self._keywords(input_ids, inputs)
        labelled = self.labels in keywords
        if labelled and self.loss_alone:
            with _random_state_kept(input_ids):
                loss = lone_loss(self._called(module, input_ids, keywords))
            del keywords[self.labels]
            output = read(self._called(module, input_ids, keywords), cache_name=self.cache)
            output.loss = loss
            return output
        holder = _holder(module, self.kept_loss)
        before = getattr(holder, self.kept_loss, None) if holder is not None else None
        output = read(self._called(module, input_ids, keywords), cache_name=self.cache)
        if holder is not None:
            if inputs.get("labels") is not None:
                output.loss = getattr(holder, self.kept_loss)
            setattr(holder, self.kept_loss, before)  # with its graph the module could not be copied
        if labelled and input_ids is not None and output.logits.dim() == 2:
            if output.logits.shape[0] != input_ids.numel():
                raise ConventionError(
                    f"with {self.labels} it returned logits {list(output.logits.shape)}, neither [batch, time, vocab] "
                    f"nor [batch * time, vocab] of ids {list(input_ids.shape)}"
                )
            output.logits = output.logits.unflatten(0, tuple(input_ids.shape))
        return output

    def _keywords(self, input_ids: Tensor | None, inputs: Mapping[str, Any]) -> dict[Any, Any]:
        """`inputs` under the names that forward() has for them, and what it requires beside them."""
        keywords: dict[Any, Any] = {}
        for key, value in inputs.items():
            if value is None or (value is False and key != "use_cache"):
                continue
            name = getattr(self, key)
            if name is None:
                if key == "use_cache":
                    continue
                raise ConventionError(f"{self.describe()} takes no {key}")
            if key == "mask" and self.mask_is_bool:
                value = value.bool()
            keywords[name] = value.contiguous() if key == "labels" else value
        if self.targets_for_logits and input_ids is not None:
            keywords.setdefault(self.labels, input_ids)
        like = input_ids
        if like is None and self.embeds in keywords:
            like = keywords[self.embeds][..., 0]
        if like is None:
            return keywords
        filled = {name: _made(how, like, self.mask_is_bool) for name, how in self.filled}
        if self.mask in keywords and "places" in dict(self.filled).values():
            places = (keywords[self.mask].long().cumsum(-1) - 1).clamp(min=0)[:, -like.shape[1] :]
            filled.update({name: places for name, how in self.filled if how == "places"})
        return {**filled, **keywords}

    def _called(self, module: nn.Module, input_ids: Tensor | None, keywords: dict[str, Any]) -> Any:
        """Whatever forward(), or call(), returns."""
        if self.call is not None:
            return self.call(module, input_ids, **keywords)
        if input_ids is None:
            return module(**keywords)
        if self.ids is None:
            return module(input_ids, **keywords)
        return module(**{self.ids: input_ids}, **keywords)


def _home(call: Callable[..., Any]) -> str:
    """mypackage.model, or model.py: a file that was named in a SPEC has no name as a module that anybody knows."""
    name = call.__module__ or "a function without a module"  # what exec() made
    file = getattr(sys.modules.get(name), "__file__", None)
    return name if "." in name or file is None else Path(file).name


def _holder(module: Any, attribute: str) -> Any:
    """What has it: the module, or the one inside a wrapper (DistributedDataParallel); None for neither."""
    while attribute and not hasattr(module, attribute):
        module = getattr(module, "module", None)
        if module is None:
            return None
    return module if attribute else None


def _made(how: str, like: Tensor, mask_is_bool: bool) -> Any:
    """`like`: anything [batch, time] where the ids are."""
    import torch

    match how:
        case "ones":
            return torch.ones(like.shape, dtype=torch.bool if mask_is_bool else torch.int64, device=like.device)
        case "places":
            return torch.arange(like.shape[1], device=like.device)[None]
        case "zero":
            return 0
        case _:
            return None


def _random_state_kept(like: Tensor | None) -> AbstractContextManager[None]:
    import torch

    return torch.random.fork_rng(devices=[like.device] if like is not None and like.is_cuda else [])


def parameters_of(module: nn.Module) -> tuple[dict[str, inspect.Parameter], bool, bool]:
    """forward()'s named parameters, whether it takes *args, and whether it takes **kwargs."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return {}, True, True
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return named, inspect.Parameter.VAR_POSITIONAL in kinds, inspect.Parameter.VAR_KEYWORD in kinds


def find_convention(
    module: nn.Module, input_ids: Tensor, call: Callable[..., Any] | None = None, where: str = "your_module"
) -> tuple[Convention, int]:
    """The convention, and the size of the vocabulary. `input_ids`: a few legal tokens, [batch, time], batch != time.

    Raises ConventionError: what was tried, what came of each, and the adapter to write.
    """
    import torch

    tried: list[str] = []
    for candidate in _candidates(module, call):
        with torch.no_grad():
            try:
                output = candidate.run(module, input_ids)
                logits = expect_logits(output.logits, input_ids)
                if "ones" in dict(candidate.filled).values():
                    _expect_nothing_hidden(candidate, module, input_ids, logits)
            except ConventionError as error:
                tried.append(f"{candidate.describe()}: {error}")
                continue
            except Exception as error:
                tried.append(f"{candidate.describe()}: {type(error).__name__}: {first_line(error)}")
                continue
        known = _with_known_mask(candidate, module, input_ids, logits)
        known = _with_known_positions(known, module, input_ids)
        return _with_known_loss(known, module, input_ids), logits.shape[-1]
    named, _, _ = parameters_of(module)
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty][1:]
    labels = next((name for name in LABELS if name in named), None)
    raise ConventionError(
        f"found no way to get logits [batch, time, vocab] out of {type(module).__name__}. Tried, with ids of shape "
        f"{list(input_ids.shape)}:\n" + "\n".join(f"  - {line}" for line in dict.fromkeys(tried)) + "\n"
        f"{advice(module, input_ids, required, labels, where)}",
        tried,
    )


def _expect_nothing_hidden(found: Convention, module: nn.Module, input_ids: Tensor, logits: Tensor) -> None:
    """Raises ConventionError where the mask of ones that is filled in hides tokens: 1 may stand for padding."""
    import torch

    other, low, high = input_ids.clone(), input_ids.min(), input_ids.max()
    other[:, 0] = torch.where(input_ids[:, 0] == low, high, low)
    moved = found.run(module, other).logits[:, -1] != logits[:, -1]
    if not bool(logits.isfinite().all() and moved.any()):
        raise ConventionError("with a mask of ones the first token does not reach the last logits: 1 may mean hidden")


def _with_known_mask(found: Convention, module: nn.Module, input_ids: Tensor, logits: Tensor) -> Convention:
    """The convention as its mask wants it: int64 or bool; without it where it is no padding mask.

    A padding mask of ones hides nothing: it must leave the logits alone, in the type in which it is taken. An argument
    called attention_mask is taken at its word, as int64 if that works, so that what is wrong with it is for the checks
    to say; any other is dropped where ones are refused or change the logits in either type.
    """
    import torch

    if found.mask is None:
        return found
    what = f"{found.mask}= is no padding mask [batch, time] with 1 for a token"
    ones = torch.ones_like(input_ids)
    taken: list[Convention] = []
    refused: list[str] = []
    for kind in ("int64", "bool"):
        given = f"ones {list(ones.shape)} of {kind}"
        candidate = replace(found, mask_is_bool=kind == "bool")
        try:
            with torch.no_grad():
                masked = candidate.run(module, input_ids, mask=ones).logits
        except Exception as error:
            refused.append(f"{given} raise {type(error).__name__}: {first_line(error)}")
            continue
        taken.append(candidate)
        if found.mask not in ANY_MASK:
            break
        moved = float((masked.double() - logits.double()).abs().max()) if masked.shape == logits.shape else float("nan")
        if not moved <= SAME * float(logits.double().std()):
            return replace(found, mask=None, mask_refusal=f"{what}: {given} change the logits (by {moved:.3g})")
    if taken or found.mask not in ANY_MASK:
        return (taken or [found])[0]
    return replace(found, mask=None, mask_refusal=f"{what}: {'; '.join(refused)}")


def _with_known_positions(found: Convention, module: nn.Module, input_ids: Tensor) -> Convention:
    """The convention without its positions, where an argument of a general name takes no 0, 1, ... [1, time].

    litgpt's `input_pos` is taken only after set_kv_cache(). position_ids are taken at their word.
    """
    import torch

    if found.positions is None or found.positions == POSITIONS[0]:
        return found
    try:
        with torch.no_grad():
            found.run(module, input_ids, positions=torch.arange(input_ids.shape[1], device=input_ids.device)[None])
    except Exception as error:
        refusal = f"{found.positions}= takes no positions 0, 1, ... [1, time]: {type(error).__name__}: "
        return replace(found, positions=None, positions_refusal=refusal + first_line(error))
    return found


def _with_known_loss(found: Convention, module: nn.Module, input_ids: Tensor) -> Convention:
    """The convention, knowing whether labels give the loss alone, or leave it in an attribute of the module.

    What else they do is for the checks to say.
    """
    import torch

    if found.labels is None:
        return found
    before = _scalars(module)
    try:
        with torch.no_grad(), _random_state_kept(input_ids):
            raw = found._called(module, input_ids, found._keywords(input_ids, {"labels": input_ids}))
        if lone_loss(raw) is not None:
            return replace(found, loss_alone=True)
        if read(raw).loss is not None:
            return found
    except Exception:
        return found
    left = [name for name, value in _scalars(module).items() if value is not before.get(name)]
    kept = _left_by_labels(found, module, input_ids) if left else ""
    if kept:
        setattr(module, kept, None)
        return replace(found, kept_loss=kept)
    if found.labels in ANY_LABELS:
        reason = f"{found.labels}= takes [batch, time] and gives no loss: nothing says that it takes labels"
        return replace(found, labels=None, labels_refusal=reason)
    return found


def _left_by_labels(found: Convention, module: nn.Module, input_ids: Tensor) -> str:
    """The attribute with a scalar that has a gradient and depends on the labels; empty where there is not one."""
    import torch

    seen = []
    for labels in (input_ids, input_ids.flip(1)):
        with torch.enable_grad(), _random_state_kept(input_ids):
            found._called(module, input_ids, found._keywords(input_ids, {"labels": labels}))
        seen.append({name: value for name, value in _scalars(module).items() if value.requires_grad})
    for name in {**seen[0], **seen[1]}:
        setattr(module, name, None)  # with its graph the module could not be copied
    one, other = seen
    moved = [name for name in one if name in other and not torch.equal(one[name], other[name])]
    return moved[0] if len(moved) == 1 else ""


def _scalars(module: nn.Module) -> dict[str, Tensor]:
    import torch

    attributes = vars(module).items()
    return {
        name: value
        for name, value in attributes
        if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()
    }


def _candidates(module: nn.Module, call: Callable[..., Any] | None) -> Iterable[Convention]:
    named, _, open_keywords = parameters_of(module)

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in named), None)

    labels = first(LABELS)
    shared: dict[str, Any] = {
        "mask": first(MASK),
        "positions": first(POSITIONS),
        "cache": first(CACHE),
        "use_cache": first(USE_CACHE),
        "embeds": first(EMBEDS),
        "labels": labels,
        "labels_shifted": labels == "labels",
        "hidden_states": first(HIDDEN),
        "attentions": first(ATTENTIONS),
    }
    if hasattr(module, "config") and hasattr(module, "main_input_name"):  # Hugging Face reads these from **kwargs
        shared["hidden_states"] = shared["hidden_states"] or "output_hidden_states"
        shared["attentions"] = shared["attentions"] or "output_attentions"
    if call is not None:
        yield _of_call(call)
        return
    if (shipped := shipped_for(module)) is not None:
        yield _of_call(shipped)
    known = [name for name in IDS if name in named]
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty and name not in known]
    shared["filled"] = tuple((name, FILLED[name]) for name in required if name in FILLED)
    roles = {*FILLED, *MASK, *POSITIONS, *CACHE, *EMBEDS, *LABELS, *USE_CACHE}
    unknown = [name for name in required if name not in roles and named[name].kind != inspect.Parameter.KEYWORD_ONLY]
    for name in [*known, *unknown[:1]]:
        yield Convention(name, **shared)
        if "ones" in dict(shared["filled"]).values():
            yield Convention(name, **shared, mask_is_bool=True)
        if shared["labels"]:
            yield Convention(name, **shared, targets_for_logits=True)
    if open_keywords and not known:
        yield Convention("input_ids", **shared)
    yield Convention(None, **shared)


def _of_call(call: Callable[..., Any]) -> Convention:
    """The convention of a `call(model, input_ids, **inputs)`: it takes the inputs that it names."""
    inputs = inspect.signature(call).parameters
    own: dict[str, Any] = {
        key: next((name for name in names if name in inputs), None)
        for key, names in (
            ("mask", MASK), ("positions", POSITIONS), ("cache", CACHE), ("use_cache", USE_CACHE),
            ("embeds", EMBEDS), ("labels", LABELS),
        )
    }  # fmt: skip
    return Convention(None, call=call, labels_shifted=own["labels"] == "labels", **own)


def first_line(error: BaseException) -> str:
    """An exception's first line, at most 200 characters; of a PlacementError also what names the stray tensor."""
    if refused := re.search(r"tried to allocate (\d+) bytes", str(error)):
        return f"out of memory: tried to allocate {int(refused[1]) / 2**30:.1f} GiB at once"
    text = str(error).strip().splitlines()
    named = getattr(error, "sentence", "")  # of a PlacementError
    return (text[0] if text else "(no message)")[:200] + (f" {named}" if named else "")
