"""Saving and loading a subject the way its library does, here and in a fresh process, and comparing what comes back."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.copies import convert
from lmconform.measuring.adapters import wraps_adapters
from lmconform.measuring.buffers import outside_the_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

CHILD_SECONDS = 100
CHILD = """\
import json, sys
job = json.load(open(sys.argv[1]))
sys.path[:] = job["path"]
from lmconform.measuring.saving import answer
answer(job)
"""


def pretrained(module: nn.Module) -> bool:
    """Whether it is saved and loaded the way transformers does."""
    both = ("save_pretrained", "from_pretrained")
    return not wraps_adapters(module) and all(callable(getattr(module, name, None)) for name in both)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load reports; both as before afterwards."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest): PyTorch's own switch, left as it was afterwards."""
    import torch
    from torch.utils import deterministic

    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def _loading_options(subject: Specimen) -> dict[str, Any]:
    config = getattr(subject.module, "config", None)
    chosen = {
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "experts_implementation": getattr(config, "_experts_implementation", None),
    }
    return {key: value for key, value in chosen.items() if value is not None}


def through_pretrained(subject: Specimen, ctx: Context, folder: str) -> Specimen:
    with quiet_transformers():
        subject.copy().module.save_pretrained(folder)  # type: ignore[operator]
        module, info = type(subject.module).from_pretrained(  # type: ignore[attr-defined]
            folder, dtype=subject.dtype, output_loading_info=True, **_loading_options(subject)
        )
    for key, problem in (
        ("missing_keys", "is not in the saved file"),
        ("unexpected_keys", "is saved, but the model has no place for it"),
        ("mismatched_keys", "is saved in another shape"),
    ):
        wrong = sorted(str(name) for name in info.get(key) or ())
        if wrong:
            ctx.fail(
                f"saved and loaded keys do not match: {wrong[0]} {problem} ({len(wrong)} such)",
                where=wrong[0],
                hint=Hint(
                    "look at _tied_weights_keys, _keys_to_ignore_on_save, conversion mappings, and names that change",
                    "weights.not_saved",
                    "weights.not_loaded",
                ),
            )
    if subject.converted:
        module = convert(module, subject.dtype)
    return subject._derive(subject.put(module).eval())


def through_adapters(subject: Specimen, folder: str) -> Specimen:
    """Saved as peft does, and loaded into a copy in which everything trainable has other weights."""
    import torch

    subject.copy().module.save_pretrained(folder)  # type: ignore[operator]
    loaded = subject.copy()
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            if parameter.requires_grad:
                poison(parameter)
    module: Any = loaded.module
    active = list(module.base_model.active_adapters) if hasattr(module.base_model, "active_adapters") else None
    for name in list(module.peft_config):
        module.load_adapter(folder if name == "default" else os.path.join(folder, name), name)
    if active:
        module.base_model.set_adapter(active)
    loaded.module.eval()
    return loaded


def saved_state(subject: Specimen) -> dict[str, Any]:
    """The state dict after torch.save, torch.load with weights_only, and safetensors for what are tensors."""
    import safetensors.torch
    import torch

    memory = io.BytesIO()
    torch.save(subject.module.state_dict(), memory)
    memory.seek(0)
    state: dict[str, Any] = torch.load(memory, weights_only=True)
    tensors = {name: value.contiguous().clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {**state, **safetensors.torch.load(safetensors.torch.save(tensors))}


def through_state_dict(subject: Specimen, ctx: Context) -> Specimen:
    """Loaded into a model built under another seed, or, without a builder, into a copy with other weights."""
    import torch

    try:
        state = saved_state(subject)
    except pickle.UnpicklingError as error:
        ctx.fail(
            f"the state dict cannot be loaded with weights_only=True: {first_line(error)}",
            hint=Hint(
                "it holds objects other than tensors and plain containers: look at get_extra_state()",
                "weights.not_saved",
            ),
        )
    if subject.builder is not None:
        module = subject.fresh(subject.seed + 1).module
    else:
        module = subject.copy().module
        with torch.no_grad():
            for tensor in module.state_dict().values():
                if isinstance(tensor, torch.Tensor):
                    poison(tensor)
    try:
        outcome = module.load_state_dict(state)
    except RuntimeError as error:
        ctx.fail(
            f"its own state dict does not load: {' '.join(str(error).split())[:300]}",
            hint=Hint(
                "a parameter is added or renamed after construction, or state_dict() is overridden",
                "weights.not_saved",
                "weights.not_loaded",
            ),
        )
    for problem, names in (("missing", outcome.missing_keys), ("unexpected", outcome.unexpected_keys)):
        if names:
            ctx.fail(
                f"{len(names)} keys of its own state dict are {problem}: {', '.join(names[:3])}",
                where=names[0],
                hint=Hint(
                    "state_dict() or load_state_dict() is overridden, strict=False hides it", "weights.not_saved"
                ),
            )
    return subject._derive(module.eval())


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have, those outside the state dict too."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def tensors_anywhere(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes."""
    import torch

    yield from named_tensors(module).items()
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}".lstrip("."), value


def same_state(
    ctx: Context, actual: dict[str, Tensor], expected: dict[str, Tensor], what: str, outside: Container[str] = ()
) -> None:
    """The same names and bits.

    A buffer `outside` the state dict may have another shape, as a table that is extended on demand: logits tell of it.
    """
    missing, added = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    for names, verb in ((missing, "lacks"), (added, "has in addition")):
        if names:
            ctx.fail(
                f"{what} {verb} {names[0]} ({len(names)} such)",
                where=names[0],
                hint=Hint(
                    "a parameter or a buffer is made in forward() or under another name: register it when building",
                    "weights.not_saved",
                ),
            )
    for name, tensor in expected.items():
        if same_bits(actual[name], tensor) or (name in outside and actual[name].shape != tensor.shape):
            continue
        if tensor.requires_grad:
            kind = "the weight"
            hint: str = Hint("it is not saved, not loaded, or initialised again after the load", "weights.not_saved")
        else:  # or replaced in use: other checks tell
            kind = "the buffer"
            hint = "it is not saved, or initialised again after the load; a buffer with persistent=False must be "
            hint += "rebuilt to the same values"
        ctx.fail(f"{kind} {name} of {what} differs from the original's", where=name, hint=hint)


def same_bits(left: Tensor, right: Tensor) -> bool:
    import torch

    if left.shape != right.shape or left.dtype != right.dtype or left.is_meta:
        return False
    return bool(torch.equal(left.detach().nan_to_num(), right.detach().nan_to_num())) and bool(
        (left.isnan() == right.isnan()).all()
    )


def poison(tensor: Tensor) -> None:
    """NaN, or the largest number of an integer type."""
    import torch

    if tensor.is_floating_point() or tensor.is_complex():
        tensor.detach().fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.detach().logical_not_()
    else:
        tensor.detach().fill_(torch.iinfo(tensor.dtype).max)


def shared_parameters(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are the same memory, one list per group of two or more."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.numel():
            groups.setdefault((parameter.data_ptr(), tuple(parameter.shape)), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def promised_tie(subject: Specimen) -> tuple[str, str] | None:
    """Names of embedding and head, where the config says that they are tied and their shapes agree."""
    module: Any = subject.module
    if getattr(subject.config, "tie_word_embeddings", False) is not True or not pretrained(module):
        return None
    table = structure.embedding(module, subject.vocab_size)
    head = structure.head(module, subject.vocab_size)  # also where get_output_embeddings() gives None
    names = {id(p): n for n, p in module.named_parameters(remove_duplicate=False)}
    first, second = getattr(table, "weight", None), getattr(head, "weight", None)
    if first is None or second is None or first.shape != second.shape or first is second:
        return None
    if id(first) not in names or id(second) not in names:
        return None
    return names[id(first)], names[id(second)]


# -- the fresh process ---------------------------------------------------------------------------------------------


def in_a_fresh_process(subject: Specimen, ctx: Context, folder: str, ids: Tensor) -> None:
    """The same in a new Python process, which builds by the SPEC or by the class's importable name."""
    import torch

    place = Path(folder)
    job: dict[str, Any] = {
        "path": sys.path,
        "folder": folder,
        "seed": subject.seed + 1,
        "dtype": str(subject.dtype),
        "converted": subject.converted,
        "threads": torch.get_num_threads(),
        "spec": subject.spec,
        "options": _loading_options(subject),
        "class": None,
    }
    if pretrained(subject.module):
        holder = type(subject.module)
        if getattr(sys.modules.get(holder.__module__), holder.__qualname__, None) is not holder or (
            holder.__module__ in ("__main__",) or holder.__module__.startswith("_lmconform")
        ):
            ctx.note(f"not tried in a fresh process: {holder.__name__} cannot be imported there")
            return
        job["class"] = [holder.__module__, holder.__qualname__]
    else:
        if not subject.spec:
            ctx.note("not tried in a fresh process: no SPEC says how to build it there")
            return
        torch.save(subject.module.state_dict(), place / "state.pt")
    torch.save(ids.cpu(), place / "ids.pt")
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    try:
        outcome = subprocess.run(
            [sys.executable, "-c", CHILD, str(place / "job.json")],
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
            env=dict(os.environ),
        )
    except subprocess.TimeoutExpired:
        ctx.fail(f"loading in a fresh process did not end within {CHILD_SECONDS} s")
        return
    if outcome.returncode != 0:
        last = (outcome.stderr.strip().splitlines() or ["(no message)"])[-1]
        ctx.fail(
            f"loading in a fresh process failed: {last[:300]}",
            hint="the model needs something that only this process has: a global, a registration, a file",
        )
    given = torch.load(place / "answer.pt", weights_only=True)
    state = {name: tensor.cpu() for name, tensor in named_tensors(subject.module).items()}
    outside = outside_the_state(subject.module)
    same_state(ctx, given["state"], state, "a model loaded in a fresh process", outside)
    ctx.equal(
        given["logits"],
        subject.logits(ids).cpu(),
        "logits differ when the saved model is loaded in a fresh process",
        hint="something that decides the logits lives in this process only: a global, hash(), a random constant",
    )


def answer(job: dict[str, Any]) -> None:
    """In the child: build, load, answer. Writes answer.pt into the job's folder."""
    import importlib

    import torch

    from lmconform.subject import Subject, as_subject

    torch.set_num_threads(job["threads"])
    place = Path(job["folder"])
    ids = torch.load(place / "ids.pt", weights_only=True)
    dtype = getattr(torch, job["dtype"].removeprefix("torch."))
    if job["class"] is not None:
        holder: Any = importlib.import_module(job["class"][0])
        for part in job["class"][1].split("."):
            holder = getattr(holder, part)
        with quiet_transformers():
            module = holder.from_pretrained(job["folder"], dtype=dtype, **job["options"])
        made = Subject(module).open(as_loaded=True, dtype=job["dtype"] if job["converted"] else None)
    else:
        made = as_subject(job["spec"]).open(seed=job["seed"], as_loaded=True, dtype=job["dtype"])
        made.module.load_state_dict(torch.load(place / "state.pt", weights_only=True))
    state = {name: tensor.detach().clone() for name, tensor in named_tensors(made.module).items()}
    torch.save({"logits": made.logits(ids), "state": state}, place / "answer.pt")
