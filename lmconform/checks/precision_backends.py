"""precision.backends: the model's attention implementations compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.drift import TIME
from lmconform.measuring.exercises import padded
from lmconform.measuring.uncompiled import uncompiled
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "precision.backends",
    holds="eager, SDPA and flex attention agree, large logits included",
    requires=COMPARES_LOGITS,
)
def check_backends(subject: Specimen, ctx: Context) -> None:
    """set_attn_implementation() on copies: plain, left-padded, on a cache; then with matrices 3 times as large.

    Flex attention runs uncompiled, where it runs at all.
    """
    change = getattr(subject.module, "set_attn_implementation", None)
    if not callable(change):
        ctx.not_applicable(f"{type(subject.module).__name__} has no set_attn_implementation()")
    ids = ctx.ids(2, subject.longest(TIME))
    for scale, base in (("", subject), (", matrices 3 times as large", subject.scaled(3.0))):
        named = {name: made for name in ("eager", "sdpa", "flex_attention") if (made := _with(base, ctx, name))}
        if len(named) < 2:
            ctx.not_applicable(f"it offers {', '.join(named) or 'no implementation'} alone")
        expected = {task: run(named["eager"], ids) for task, run in _tasks(subject).items()}
        for name, model in named.items():
            if name == "eager":
                continue
            with uncompiled():
                for task, run in _tasks(subject).items():
                    try:
                        logits = run(model, ids)
                    except Exception as error:
                        if name == "sdpa":
                            raise
                        ctx.note(f"flex attention does not run here: {type(error).__name__}: {first_line(error)}")
                        break
                    ctx.equal(
                        logits,
                        expected[task],
                        f"logits with {name.removesuffix('_attention')} attention differ from eager's",
                        where=f"{task}{scale}",
                        noise=base.noise,
                        hint=Hint(
                            "the paths do not do the same: scaling, softcap, sinks, window, grouped heads or the mask "
                            "(is_causal without one) are in one and not in the other",
                            "mask.fast_path",
                            "attention.unscaled",
                        ),
                    )


def _tasks(subject: Specimen) -> dict[str, Callable[[Specimen, Tensor], Tensor]]:
    tasks: dict[str, Callable[[Specimen, Tensor], Tensor]] = {"forward": lambda model, ids: model.logits(ids)}
    if subject.can("mask"):
        tasks["left-padded"] = padded
    if subject.can("cache"):
        tasks["a chunk on a cache"] = _on_a_cache
    return tasks


def _on_a_cache(subject: Specimen, ids: Tensor) -> Tensor:
    split = ids.shape[1] // 2
    past = subject.forward(ids[:, :split], use_cache=True)
    return subject.forward(ids[:, split:], cache=past.cache, use_cache=True).logits


def _with(subject: Specimen, ctx: Context, name: str) -> Specimen | None:
    """A copy that uses that implementation; None where the model does not offer it."""
    copied = subject.copy()
    change: Any = copied.module.set_attn_implementation
    try:
        change(name)
    except (ValueError, ImportError, KeyError) as error:
        ctx.note(f"no {name}: {first_line(error)}")
        return None
    used = getattr(copied.config, "_attn_implementation", name)
    return copied if used == name else None
