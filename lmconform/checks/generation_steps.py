"""Why greedy generate() leaves plain forwards: its inputs, what the calls before left behind, the cache, the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.context import Hint, Unavailable
from lmconform.measuring.generate_calls import calls_recorded, unlike_plain_calls
from lmconform.measuring.generating import Generator

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

INPUTS = (
    "generate() feeds other inputs than forward() got here: the prompt cut, the cache stale, position_ids not "
    "advancing by one each step or counted from another start, the last token given twice, or the logits of "
    "another position read"
)


def why_not_plain(subject: Specimen, ctx: Context, ids: Tensor, new: int) -> Hint:
    """What makes `new` tokens after `ids` [batch, time] others than a loop over plain forwards makes. Never raises."""
    general = Hint(INPUTS, "generation.inputs_differ", "position.restarts_on_decode")
    try:
        return _left_behind(subject, ids, new) or _by_calls(subject, ids, new) or general
    except Exception as error:  # a hint is not worth a check
        ctx.note(f"why was not measured: {type(error).__name__}")
        return general


def _left_behind(subject: Specimen, ids: Tensor, new: int) -> Hint | None:
    """Whether the same call gives other tokens a second time, or in a model that has answered nothing before."""
    import torch

    def once(specimen: Specimen) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Generator(specimen).greedy(ids, new)

    calls = [once(subject), once(subject)]
    found = "two calls of generate() on the same prompt give other tokens"
    if torch.equal(*calls):
        try:
            unused = subject.unused()
        except Unavailable:
            return None
        fresh = once(unused)
        if torch.equal(fresh, calls[0]) or _leaves_argmax(unused, ids, fresh):
            return None
        found = "in a model that has answered nothing before, the same call of generate() is right"
    return Hint(
        f"{found}: it goes on with what a call before has left (a cache or table that is kept and not set back, a "
        "counter on the module)",
        "state.carried_over",
    )


def _leaves_argmax(specimen: Specimen, ids: Tensor, made: Tensor) -> bool:
    import torch

    plain = specimen.logits(torch.cat([ids, made], dim=1))[:, ids.shape[1] - 1 : -1]
    gaps = plain.amax(-1) - plain.gather(-1, made[..., None])[..., 0]
    return float(gaps.max()) > 2 * tolerance.allowed(specimen.noise, plain)


def _by_calls(subject: Specimen, ids: Tensor, new: int) -> Hint | None:
    """What the recorded calls say: other inputs, other logits from the same, or another token from the same logits."""
    import torch

    with calls_recorded(subject) as calls:
        made = Generator(subject).greedy(ids, new)
    unlike = unlike_plain_calls(subject, calls, ids, made)
    if unlike is None:
        return None
    if unlike:
        return Hint(f"{unlike}; {INPUTS}", "generation.inputs_differ", "position.restarts_on_decode")
    plain = subject.logits(torch.cat([ids, made], dim=1))[:, ids.shape[1] - 1 : -1]
    bound = tolerance.allowed(subject.noise, plain)
    same = "generate() gives forward() the tokens, positions and mask that a plain loop gives"
    for step, call in enumerate(calls[: made.shape[1]]):
        off = float((call.logits.to(plain) - plain[:, step]).abs().max())
        if off <= bound:
            continue
        if call.ids.shape[1] == ids.shape[1] + step:  # no cache had a part in it
            return None
        return Hint(
            f"{same}: step 0 is right, and step {step} on its cache is {off:.2g} off, so what the cache holds or how "
            "it is read is at fault",
            "cache.wrong_value",
            "cache.stale",
            "position.restarts_on_decode",
            "cache.ignored" if step == 1 else "cache.truncated",
        )
    return Hint(
        f"{same}, gets the logits of plain forwards, and takes another token than the likeliest: look at what is done "
        "to the logits and to the chosen token",
        "generation.control_wrong",
        "generation.ids_out_of_vocab",
    )
