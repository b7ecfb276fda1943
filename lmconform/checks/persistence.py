"""persistence: a model that is saved, loaded, moved or copied is the same model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.copies import cast
from lmconform.measuring.adapters import saves_adapters, wraps_adapters
from lmconform.measuring.buffers import outside_the_state
from lmconform.measuring.dropout import without_dropout
from lmconform.measuring.saving import (
    in_a_fresh_process,
    named_tensors,
    poison,
    poisoned_memory,
    pretrained,
    promised_tie,
    quiet_transformers,
    same_bits,
    same_state,
    saved_state,
    shared_parameters,
    tensors_anywhere,
    through_adapters,
    through_pretrained,
    through_state_dict,
)
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

DRAWING = (
    "normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "orthogonal_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_",
)  # fmt: skip
BATCHES = 16  # in train mode, to see what buffers learn


@register_check(
    "persistence.round_trip",
    holds="save, fresh process, load: equal bits; key sets exact; buffers included; safetensors",
    needs=("save",),
    requires=COMPARES_LOGITS,
)
def check_round_trip(subject: Specimen, ctx: Context) -> None:
    """Saved and loaded into a model that was built anew under another seed; thorough: in a fresh process too.

    transformers' models go through save_pretrained and from_pretrained, others through their state_dict, torch.load
    with weights_only, and safetensors; peft's adapters beside that through save_pretrained and load_adapter. Every
    parameter and buffer must be equal bit for bit, then the logits. What a model learns in buffers while it runs in
    train mode (the bias that balances experts) must come back too: where such a buffer is outside the state dict, the
    same again after a few batches.
    """
    ids = ctx.ids(2, subject.longest(20))
    with tempfile.TemporaryDirectory(prefix="lmconform-") as folder:
        if pretrained(subject.module):
            with poisoned_memory():  # what is left uninitialised would be right by chance, now and then
                loaded = through_pretrained(subject, ctx, folder)
        else:
            loaded = through_state_dict(subject, ctx)
        made, outside = named_tensors(loaded.module), outside_the_state(subject.module)
        same_state(ctx, made, named_tensors(subject.module), "a model that was saved and loaded", outside)
        ctx.equal(
            loaded.logits(ids),
            subject.logits(ids),
            "logits differ after saving and loading",
            hint=Hint(
                "something that decides the logits is neither a parameter nor a buffer of the state_dict: a "
                "tensor kept as a plain attribute, a buffer with persistent=False that is not rebuilt the same, or a "
                "patched method",
                "weights.not_saved",
                "grad.unregistered",
            ),
        )
        if saves_adapters(subject.module):
            ctx.equal(
                through_adapters(subject, folder).logits(ids),
                subject.logits(ids),
                "logits differ after saving the adapters and loading them",
                hint=Hint(
                    "something that was trained is not among what peft saves: name it in modules_to_save",
                    "weights.not_saved",
                ),
            )
        _check_learnt_buffers(subject, ctx, loaded, folder, ids)
        if ctx.profile == "thorough":
            in_a_fresh_process(subject, ctx, folder, ids)


def _check_learnt_buffers(subject: Specimen, ctx: Context, loaded: Specimen, folder: str, ids: Tensor) -> None:
    """Buffers outside the state dict that train mode changes: the logits must not depend on what they have become.

    A table that is extended on demand changes too, and is made again by whoever needs it. `loaded` is overwritten.
    """
    import torch

    outside = outside_the_state(subject.module)
    if not outside:
        return
    trained = without_dropout(subject, lent=True)
    before = {name: buffer.clone() for name, buffer in trained.module.named_buffers() if name in outside}
    learnt: list[str] = []
    for batch in range(BATCHES):  # what is learnt by small steps takes several to be felt
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)
            trained.logits(ctx.ids(4, subject.longest(40), salt=31 + batch), train=True)
        now = dict(trained.module.named_buffers())
        learnt = sorted(name for name in before if name in now and not same_bits(before[name], now[name]))
        if not learnt:
            return
    expected = trained.logits(ids)
    if pretrained(subject.module):
        again = through_pretrained(trained, ctx, folder)
    else:
        again = loaded
        again.module.load_state_dict(saved_state(trained))
    ctx.equal(
        again.logits(ids),
        expected,
        f"{learnt[0]} is changed in train mode and not saved: logits differ after saving and loading",
        where=f"{len(learnt)} such buffers" if len(learnt) > 1 else "",
        hint=Hint(
            f"a buffer registered with persistent=False is not in state_dict(), so that what was learnt in {learnt[0]} "
            "is lost with the process: register it with persistent=True",
            "weights.not_saved",
        ),
    )


@register_check(
    "persistence.tied",
    holds="tied weights are one tensor after load, move, resize, copy",
    needs=("save",),
)
def check_tied(subject: Specimen, ctx: Context) -> None:
    """Every group of parameters that share memory shares it still after each of these."""
    import torch

    groups = shared_parameters(_as_built(subject))
    promised = promised_tie(subject)
    if promised is not None and not any(set(promised) <= set(group) for group in groups):
        ctx.fail(
            f"the config says tie_word_embeddings, but {promised[0]} and {promised[1]} are two tensors",
            where=promised[1],
            hint=Hint("tie_weights() was not called, or _tied_weights_keys does not name the head", "weights.untied"),
        )
    if not groups:
        ctx.not_applicable("no two of its parameters share memory")

    def remain(module: nn.Module, after: str, hint: str) -> None:
        now = dict(module.named_parameters(remove_duplicate=False))
        for group in groups:
            present = [name for name in group if name in now]
            places = {now[name].data_ptr() for name in present}
            if len(places) > 1:
                ctx.fail(
                    f"tied weights are {len(places)} separate tensors after {after}: {' and '.join(present)}",
                    where=present[-1],
                    hint=hint,
                )

    by_parameter = "tie the Parameter (head.weight = embedding.weight), not its data, and in the constructor"
    remain(subject.module, f"the move to {subject.device}", by_parameter)
    remain(subject.copy().module, "a deep copy", by_parameter)
    other = torch.float64 if not subject.is_large else torch.float16
    remain(subject.copy().module.to(other), f"a move to another dtype, .to({other})", by_parameter)
    if pretrained(subject.module):
        with tempfile.TemporaryDirectory(prefix="lmconform-") as folder:
            remain(
                through_pretrained(subject, ctx, folder).module,
                "save_pretrained and from_pretrained",
                "_tied_weights_keys does not name the head, or tie_weights() is overridden",
            )
        _check_resize(subject, ctx, groups, remain)
    elif subject.builder is not None:
        remain(through_state_dict(subject, ctx).module, "building anew and load_state_dict", by_parameter)


def _as_built(subject: Specimen) -> nn.Module:
    """The model before it was moved to the device where it is."""
    if subject.builder is None or subject.device.type == "cpu":
        return subject.module
    return subject.builder(subject.seed)


def _check_resize(subject: Specimen, ctx: Context, groups: list[list[str]], remain: Any) -> None:
    from transformers.modeling_utils import PreTrainedModel

    module = subject.copy().module
    assert isinstance(module, PreTrainedModel)
    table = module.get_input_embeddings()
    rows = getattr(getattr(table, "weight", None), "shape", (0,))[0]
    names = (
        {name for name, part in module.named_parameters(remove_duplicate=False) if part is table.weight}
        if rows
        else set()
    )
    if not any(names & set(group) for group in groups):
        return
    with quiet_transformers():
        try:
            module.resize_token_embeddings(rows + 3, mean_resizing=False)
        except NotImplementedError as error:
            ctx.note(f"resize_token_embeddings is not offered: {first_line(error)}")
            return
    left = getattr(module.get_input_embeddings().weight, "shape", (0,))[0]
    if left != rows + 3:
        ctx.fail(f"resize_token_embeddings({rows + 3}) left {left} rows")
    remain(
        module, f"resize_token_embeddings({rows + 3})", "the resize replaces one of them: call tie_weights() after it"
    )


@register_check(
    "persistence.meta",
    holds="meta-device construction plus load leaves nothing uninitialised",
    needs=("save",),
    profile="smoke",
    requires=COMPARES_LOGITS,
)
def check_meta(subject: Specimen, ctx: Context) -> None:
    """Memory that nobody writes is filled with NaN, so that what stays uninitialised shows.

    transformers' models: from_pretrained, which builds on the meta device; buffers outside the state dict must come
    out right too. Others: the builder under torch.device("meta"), to_empty, the reset methods of those modules that own
    buffers outside the state dict, load_state_dict. A plain module that has such buffers and no method that would write
    them has not promised this.
    """
    if wraps_adapters(subject.module):
        ctx.not_applicable("peft puts its adapters on a base that is loaded already: check the base model")
    ids = ctx.ids(2, subject.longest(20))
    if pretrained(subject.module):
        with tempfile.TemporaryDirectory(prefix="lmconform-") as folder, poisoned_memory():
            loaded = through_pretrained(subject, ctx, folder)
        how = "from_pretrained, which builds on the meta device"
        hint = Hint(
            "from_pretrained never runs what the constructor computes: write it in _init_weights, or save the buffer",
            "weights.buffer_uninitialised",
        )
    else:
        loaded = _from_meta(subject, ctx)
        how = "building on the meta device and loading"
        hint = Hint(
            "the constructor computes it and the load does not: save it (persistent=True), or write it in "
            "reset_parameters()",
            "weights.buffer_uninitialised",
        )
    stranded = [name for name, tensor in tensors_anywhere(loaded.module) if tensor.is_meta]
    if stranded:
        ctx.fail(
            f"{stranded[0]} is still on the meta device after {how}: no values can reach it",
            where=stranded[0],
            hint=Hint(
                "it is a plain attribute: register it as a buffer",
                "weights.buffer_uninitialised",
                "device.unregistered_tensor",
            ),
        )
    expected = named_tensors(subject.module)
    for name, tensor in named_tensors(loaded.module).items():
        if name in expected and not same_bits(tensor, expected[name]):
            message = f"{name} is not what it was after {how}: uninitialised, or another value"
            if tensor.requires_grad:
                hint = Hint("a parameter that the state dict lacks, or that the load passes by", "weights.not_saved")
            ctx.fail(message, where=name, hint=hint)
    ctx.equal(loaded.logits(ids), subject.logits(ids), f"logits differ after {how}", hint=hint)


def _from_meta(subject: Specimen, ctx: Context) -> Specimen:
    import torch

    if subject.builder is None:
        ctx.not_applicable("a finished model was given, so it cannot be built on the meta device")
    assert subject.builder is not None
    try:
        with torch.device("meta"), _nothing_drawn():
            module = subject.builder(subject.seed)
    except Exception as error:
        ctx.not_applicable(f"the builder does not run under torch.device('meta'): {first_line(error)}")
    state = saved_state(subject)
    own = outside_the_state(module)
    resets: dict[str, Any] = {}
    for name in sorted(own):
        owner = module.get_submodule(name.rpartition(".")[0])
        method = next(
            (
                m
                for n in ("reset_buffers", "init_buffers", "reset_parameters", "init_weights")
                if callable(m := getattr(owner, n, None))
            ),
            None,
        )
        if method is None and module.get_buffer(name).is_meta:
            ctx.not_applicable(
                f"{name} is outside the state dict, and {type(owner).__name__} has no reset_parameters()"
            )
        resets[name.rpartition(".")[0]] = method

    def empty(tensor: Tensor) -> Tensor:  # as to_empty() does it, by an operation that loads sympy on the meta device
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=subject.device)

    module = cast(module, subject.dtype)._apply(empty)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in state or name in own:
                poison(tensor)
        for method in filter(None, resets.values()):
            method()
    module.load_state_dict(state)
    return subject._derive(module.eval())


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Random numbers in place are not drawn on the meta device, where torch would load its compiler to do nothing."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Drawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            drawn = args[0] if args else kwargs.get("tensor")  # so torch.nn.init hands it on
            if getattr(func, "__name__", "") in DRAWING and isinstance(drawn, torch.Tensor) and drawn.is_meta:
                return drawn
            return func(*args, **kwargs)

    with Drawn():
        yield


@register_check(
    "persistence.copy",
    holds="deepcopy and pickling keep behaviour",
    requires=COMPARES_LOGITS,
    profile="smoke",
)
def check_copy(subject: Specimen, ctx: Context) -> None:
    """A copy answers the same, is not touched by the original's weights, and follows its own.

    A method that was replaced on the instance still belongs to the original after copy.deepcopy: the copy then answers
    with the original's weights. A model that refuses to be pickled is noted; one that comes back different is red.
    """
    import torch

    ids = ctx.ids(2, subject.longest(20))
    expected = subject.logits(ids)
    original = subject._derive(subject.module)
    try:
        copied = original._derive(copy.deepcopy(subject.module))
    except Exception as error:
        ctx.fail(
            f"copy.deepcopy(model) raises {type(error).__name__}: {first_line(error)}",
            hint="it holds something that cannot be copied (a non-leaf tensor, a lock, a generator, an open file)",
        )
    _behaves(ctx, copied, ids, expected, "copy.deepcopy(model)")
    _is_independent(ctx, subject, copied, ids, expected)
    del copied
    with tempfile.TemporaryFile() as file:  # not in memory, where pickle.dumps() would hold the weights once more
        try:
            torch.save(subject.module, file)
        except Exception as error:
            ctx.note(f"it cannot be pickled, so torch.save(model) and spawned workers are out: {first_line(error)}")
            return
        file.seek(0)
        # this file is our own, written a line above: loading a pickle from elsewhere would run code
        loaded = torch.load(file, weights_only=False)
    _behaves(ctx, original._derive(loaded), ids, expected, "torch.load(torch.save(model))")


def _behaves(ctx: Context, made: Specimen, ids: Tensor, expected: Tensor, how: str) -> None:
    hint = Hint(
        "__getstate__, __setstate__, __deepcopy__ or __reduce__ drops or resets something that decides the logits",
        "weights.not_saved",
    )
    try:
        logits = made.logits(ids)
    except Exception as error:
        ctx.fail(f"{how} gives a model that raises {type(error).__name__}: {first_line(error)}", hint=hint)
    ctx.equal(logits, expected, f"logits of {how} differ from the model's", hint=hint)


def _is_independent(ctx: Context, subject: Specimen, copied: Specimen, ids: Tensor, expected: Tensor) -> None:
    import torch

    hint = Hint(
        "a method replaced on the instance (model.forward = ...) or a hook still refers to the original: patch the "
        "class, or use a module",
        "weights.not_saved",
        "state.carried_over",
    )
    theirs = {p.untyped_storage().data_ptr() for p in subject.module.parameters() if p.numel()}
    for name, parameter in copied.module.named_parameters():
        if parameter.numel() and parameter.untyped_storage().data_ptr() in theirs:
            ctx.fail(
                "copy.deepcopy(model) shares memory with the model",
                where=name,
                hint=Hint("__deepcopy__ returns the same tensor", "weights.not_saved", "state.carried_over"),
            )
    generator = ctx.generator(7)
    with torch.no_grad():
        for other in copied.module.parameters():
            if other.is_floating_point():
                other.mul_(1 + 0.3 * torch.randn(other.shape, generator=generator).to(other))
    if torch.equal(copied.logits(ids), expected):
        ctx.fail("all weights of copy.deepcopy(model) were changed, and its answer was not", hint=hint)
    ctx.equal(subject.logits(ids), expected, "changing a deep copy's weights changed the original's logits", hint=hint)
