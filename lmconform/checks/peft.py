"""peft: a LoRA adapter starts as the identity, reaches the logits, and merges into the weights it belongs to."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring import adapters
from lmconform.measuring.saving import quiet_transformers
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

ANOTHER_PATH = Hint(
    "the model reads that layer's weight instead of calling the layer (F.linear(x, self.q.weight), a weight fused or "
    "cached beforehand, a kernel that is given the weights): an adapter wraps the call",
    "peft.adapter_inert",
)


@register_check(
    "peft.inert",
    holds="a LoRA adapter starts as the identity, every adapted layer reaches the logits, and only the adapter trains",
    needs=("peft",),
    requires=COMPARES_LOGITS,
    profile="thorough",
)
def check_inert(subject: Specimen, ctx: Context) -> None:
    """LoRA (Hu et al. 2021) on every linear layer of the blocks, by peft: B starts at 0, so nothing changes.

    One backward through random weights on all logits: each adapter's B must get a gradient, the base none. Then every
    B is moved and the logits must change.
    """
    ids = ctx.ids(2, subject.longest(20))
    wrapped, names = _adapted(subject, ctx)
    base = subject.logits(ids)
    ctx.equal(
        _logits(wrapped, ctx, ids),
        base,
        "a fresh LoRA adapter changes the logits",
        hint=Hint(
            "wrapping changes the model: forward() tells layers apart by type, or reads the weight of a wrapped one",
            "peft.adapter_inert",
        ),
    )
    _only_adapters_train(wrapped, ctx, ids, names)
    adapters.perturb(wrapped.module, ctx.generator(3))
    ctx.differs(wrapped.logits(ids), base, "a LoRA adapter with weights in it does nothing", hint=ANOTHER_PATH)


def _only_adapters_train(wrapped: Specimen, ctx: Context, ids: Tensor, names: list[str]) -> None:
    import torch

    logits = wrapped.logits(ids, grad=True)
    (logits * torch.randn(logits.shape, generator=ctx.generator(5)).to(logits)).sum().backward()
    base = [name for name, p in wrapped.module.named_parameters() if "lora_" not in name and (p.grad is not None)]
    if base:
        ctx.fail(
            f"{base[0]} belongs to the base model and gets a gradient while an adapter trains",
            where=base[0],
            hint=Hint(
                "the model sets requires_grad itself, in forward() or a hook", "grad.frozen", "peft.adapter_inert"
            ),
        )
    layers = adapters.layers(wrapped.module)
    for name in names:
        layer = layers[name]
        dead = [
            key
            for key, second in layer.lora_B.items()
            if second.weight.grad is None or not bool(second.weight.grad.abs().max() > 0)
        ]
        if dead:
            ctx.fail(
                f"the LoRA adapter on {name} does nothing: its gradient is {'missing' if _gone(layer) else '0'}",
                where=name, hint=ANOTHER_PATH,
            )  # fmt: skip


def _gone(layer: torch.nn.Module) -> bool:
    return all(second.weight.grad is None for second in layer.lora_B.values())  # type: ignore[operator]


@register_check(
    "peft.merge",
    holds="a LoRA adapter with weights in it merges to equal logits, comes off again, and survives save and load",
    needs=("peft",),
    requires=COMPARES_LOGITS,
    profile="thorough",
)
def check_merge(subject: Specimen, ctx: Context) -> None:
    """merge_adapter and unmerge_adapter, merge_and_unload, disable_adapter, save_pretrained and from_pretrained."""
    ids = ctx.ids(2, subject.longest(20))
    wrapped, names = _adapted(subject, ctx)
    adapters.perturb(wrapped.module, ctx.generator(3))
    adapted, base = _logits(wrapped, ctx, ids), subject.logits(ids)
    model = wrapped.module
    with model.disable_adapter():  # type: ignore[operator]
        ctx.equal(
            wrapped.logits(ids), base, "logits with the adapter switched off differ from the base model's",
            hint=Hint("the model caches something that it computed with the adapter on", "peft.merge_differs"),
        )  # fmt: skip
    _survives(subject, ctx, wrapped, ids, adapted, names)
    model.merge_adapter()  # type: ignore[operator]
    merged_hint = Hint(
        "the layer does more than x @ weight.T + bias (a subclass of nn.Linear that scales, quantises or normalises "
        "its weight), or the weight is also read somewhere else (tied, fused, cached)",
        "peft.merge_differs",
    )
    ctx.equal(
        wrapped.logits(ids), adapted, "logits after merging the adapter into the weights differ from those before",
        hint=merged_hint,
    )  # fmt: skip
    model.unmerge_adapter()  # type: ignore[operator]
    ctx.equal(wrapped.logits(ids), adapted, "logits after merging and unmerging differ", hint=merged_hint)
    unloaded = subject._derive(model.merge_and_unload().eval())  # type: ignore[operator]
    ctx.equal(
        unloaded.logits(ids), adapted, "logits of merge_and_unload() differ from the adapted ones", hint=merged_hint
    )


def _survives(
    subject: Specimen, ctx: Context, wrapped: Specimen, ids: Tensor, adapted: Tensor, names: list[str]
) -> None:
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="lmconform-") as folder, quiet_transformers():
        try:
            wrapped.module.save_pretrained(folder)  # type: ignore[operator]
            loaded = PeftModel.from_pretrained(subject.copy().module, folder)
        except Exception as error:
            ctx.fail(
                f"saving and loading the adapter raises {type(error).__name__}: {first_line(error)}",
                hint="peft writes adapter_model.safetensors by the names of the modules: state_dict() is overridden, "
                "or the config cannot be written",
            )
            raise
    ctx.equal(
        subject._derive(loaded.eval()).logits(ids), adapted, "logits differ after saving and loading the adapter",
        where=f"{len(names)} adapted layers",
        hint=Hint(
            "its weights are not found under the names they were saved by: state_dict() or load_state_dict() is "
            "overridden, or a module is named like peft's own parts (lora_A, default)",
            "peft.merge_differs",
            "weights.not_saved",
        ),
    )  # fmt: skip


def _adapted(subject: Specimen, ctx: Context) -> tuple[Specimen, list[str]]:
    try:
        wrapped, names, refused = adapters.adapted(subject, adapters.targets(subject))
    except Exception as error:
        ctx.fail(
            f"peft cannot put a LoRA adapter on it: {type(error).__name__}: {first_line(error)}",
            hint="layers must be nn.Linear (or transformers' Conv1D) modules that copy.deepcopy can copy",
        )
        raise
    for name, why in refused.items():
        ctx.note(f"peft takes no adapter on {name}: {why}")
    if not names:
        ctx.not_applicable("peft refuses an adapter on every linear layer")
    return wrapped, names


def _logits(wrapped: Specimen, ctx: Context, ids: Tensor) -> Tensor:
    try:
        return wrapped.logits(ids)
    except Exception as error:
        ctx.fail(
            f"forward() raises {type(error).__name__} once a LoRA adapter is on: {first_line(error)}",
            hint="peft's model passes all arguments on to forward(); " + ANOTHER_PATH,
        )
        raise
