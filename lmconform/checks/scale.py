"""scale: hidden states and attention scores keep a sane size from layer to layer."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from lmconform import charts, structure, tolerance
from lmconform.context import Hint
from lmconform.copies import shares_memory
from lmconform.measuring import traces
from lmconform.registry import register_check

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

JUMP = 8.0  # times, from one block to the next, beyond unit size: a block adds terms of the order of its normed input
DOUBLING = 1.9  # every block multiplies the stream by at least this: exponential in depth
SATURATED = 0.01  # share of the largest possible entropy that a layer's attention keeps, over all heads and rows
IDLE = 1e-4  # share of a block's output that changes when all earlier tokens change
RARER_SIGN = 0.01  # share of a block's outputs that has it, at least: about 0.5 where nothing forces them
GAIN = 1.0  # projections are re-drawn with this RMS times sqrt(fan_in): unit size in, unit size out
SOFTMAX_TIME = 29  # a length that is no other size, so that attention's softmax is told from a router's
LONGEST_BATCH = 64


@register_check(
    "scale.residual",
    holds="hidden-state RMS by layer, shown as a profile; jumps flagged",
    profile="smoke",
    requires=("contract.shape", "contract.finite"),
)
def check_residual(subject: Specimen, ctx: Context) -> None:
    """The median token's RMS before and after each block, with the weights as they came.

    The median, because trained models give a few tokens massive activations by themselves (Sun et al. 2024,
    arXiv:2402.17762). A block may lift a tiny embedding to unit size; beyond that it neither multiplies nor divides
    the stream by more than JUMP, and not every block doubles it.
    """
    loaded = subject.as_loaded()
    trace = traces.stream(loaded, ctx.ids(4, subject.longest(32)))
    if trace is None:
        ctx.not_applicable("no repeated blocks were found and forward() gives no hidden states")
        return
    sizes = [rms(state) for state in trace.states]
    ctx.record(charts.curves("Hidden-state RMS by layer", "blocks passed", "RMS", {"the model": sizes}, log="y"))
    ctx.note("hidden-state RMS by layer: " + " ".join(f"{size:.3g}" for size in sizes))
    largest = max(float(state.abs().max()) for state in trace.states)
    if largest > 65504:
        ctx.note(f"the largest activation is {largest:.3g}: float16 ends at 65504")
    for index, size in enumerate(sizes):
        if not math.isfinite(size) or size == 0:
            ctx.fail(
                f"hidden states are {'all zero' if size == 0 else 'not finite'} after {trace.names[index]}",
                where=trace.names[index],
                hint=Hint("a division by a vanished norm, or weights that were never initialised", "norm.epsilon"),
            )
    for index in range(1, len(sizes)):
        before, after, place = sizes[index - 1], sizes[index], trace.names[index]
        ctx.within(
            after / max(before, 1.0),
            JUMP,
            f"hidden states grow by a jump in one block, RMS {before:.3g} to {after:.3g}",
            where=place,
            hint=Hint(
                "one block's output is out of scale: its initialisation, a scale factor applied twice, or a "
                "missing norm",
                "scale.hidden",
            ),
        )
        ctx.within(
            min(before, 1.0) / after,
            JUMP,
            f"hidden states shrink by a jump in one block, RMS {before:.3g} to {after:.3g}",
            where=place,
            hint=Hint(
                "the residual is overwritten or scaled down: look for x = f(x) in place of x = x + f(x)", "scale.hidden"
            ),
        )
    growths = [after / before for before, after in itertools.pairwise(sizes)]
    if len(growths) >= 3:
        ctx.within(
            min(growths),
            DOUBLING,
            f"every block multiplies the hidden states, by {min(growths):.2g} or more: exponential growth over depth",
            where=f"{trace.names[1]} to {trace.names[-1]}",
            hint=Hint(
                "the residual is added twice (x + x + f(x)), or each block's output lacks its norm",
                "scale.residual_growth",
            ),
        )


@register_check(
    "scale.signs",
    holds="what leaves a block has both signs: nothing forces the residual stream to one side",
    profile="smoke",
    requires=("contract.shape", "contract.finite"),
)
def check_signs(subject: Specimen, ctx: Context) -> None:
    """The share of the rarer sign among all numbers that leave a block, weights as they came.

    A block adds terms of either sign to its input. An absolute value, ReLU, sigmoid or softmax on the sum ("so that
    states are probabilities") leaves one sign: two states that differ in it alone become one, each block can only add,
    and the residual is no identity any more. Zeros count for neither sign. Embeddings of one sign are sound: a table
    of them is drawn anew with both, and a block that still gets one sign only is not judged.
    """
    import torch

    ids = ctx.ids(4, subject.longest(32))
    loaded = subject.as_loaded()
    trace = traces.stream(loaded, ids)
    if trace is None:
        ctx.not_applicable("no repeated blocks were found and forward() gives no hidden states")
        return
    weight = _weight(loaded)
    if _rarer_sign(trace.states[0]) < RARER_SIGN and weight is not None:
        drawn = loaded.copy()
        numbers = torch.randn(weight.shape, generator=ctx.generator()) * weight.detach().cpu().square().mean().sqrt()
        with torch.no_grad():
            _weight(drawn).copy_(numbers)
        trace = traces.stream(drawn, ids) or trace
    shares = [_rarer_sign(trace.states[0])]
    for name, state in zip(trace.names[1:], trace.states[1:]):
        positive, negative = int((state > 0).sum()), int((state < 0).sum())
        if positive + negative == 0:
            continue  # all zero: scale.residual's finding
        came = shares[-1]
        shares.append(_rarer_sign(state))
        if came < RARER_SIGN:
            continue
        fewer = f"{negative} are negative" if negative < positive else f"{positive} are positive"
        message = f"hidden states are one-sided after {name}: of {state.numel()} numbers {fewer}"
        hint = Hint(
            "an abs(), relu(), sigmoid() or softmax() stands on the residual stream: take it out, and keep "
            "nonlinearities inside the branches that are added to it",
            "scale.one_sided",
        )
        if shares[-1] == 0:
            ctx.fail(message, where=name, hint=hint)
        ctx.within(
            RARER_SIGN / shares[-1],
            1.0,
            f"{message}: the {RARER_SIGN:.0%} expected at least, over their share",
            where=name,
            hint=hint,
        )
    ctx.note("share of the rarer sign by layer: " + " ".join(f"{share:.2f}" for share in shares[1:]))


def _weight(specimen: Specimen) -> Any:
    """Of the token embedding, [vocab, width]; None where there is none."""
    return getattr(structure.embedding(specimen.module, specimen.vocab_size), "weight", None)


def _rarer_sign(state: Tensor) -> float:
    """Its share among the numbers that are not 0; 0 where all are."""
    positive, negative = int((state > 0).sum()), int((state < 0).sum())
    return min(positive, negative) / max(positive + negative, 1)


def rms(state: Tensor) -> float:
    """The median over tokens of the root mean square over the width."""
    return float(state.double().square().mean(-1).sqrt().flatten().median())


@register_check(
    "scale.attention",
    holds="attention scores' spread and entropy by layer: unscaled, saturated or gated-off attention",
    profile="smoke",
    requires=("contract.shape", "contract.finite"),
)
def check_attention(subject: Specimen, ctx: Context) -> None:
    """Spread of the scores before the softmax on re-drawn weights, entropy on the weights as they came, influence.

    Unscaled: with every projection re-drawn to a known size, scores that are divided by sqrt(d) spread by about 1
    whatever d is, and unscaled ones sqrt(d) times as far (Vaswani et al. 2017, section 3.2.1); a factor that the
    config states is taken into account. Position biases drop out: only what differs between sequences counts.
    Gated off: other tokens put before a block change nothing at its last position.
    """
    ids = ctx.ids(8, subject.longest(SOFTMAX_TIME))
    drawn = _redrawn(subject, ctx.seed)
    scores = traces.attention_scores(drawn, ids)
    if not scores:
        ctx.not_applicable("no attention was seen: no softmax over the tokens and no scaled_dot_product_attention")
    _check_spread(ctx, drawn, scores)
    del drawn  # of a large model there is not room for all at once
    _check_entropy(ctx, traces.attention_scores(subject.as_loaded(), ids))
    _check_influence(ctx, subject, sorted({found.block for found in scores if found.block >= 0}))


def _redrawn(subject: Specimen, seed: int) -> Specimen:
    """A copy whose projections are random and of a known size, without biases, and whose norms do nothing but norm.

    A trained model's alignments and gains are gone: what is left is the code's own scaling. Adapters of peft add
    nothing, as when they are new.
    """
    import torch
    from torch import nn

    loaded = subject.as_loaded()
    made_anew = subject.is_large and not shares_memory(loaded.module, subject.module)  # a builder may keep one module
    copied = loaded if made_anew else loaded.copy()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, part in copied.module.named_modules():
            weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
            if isinstance(part, nn.MultiheadAttention):
                _redraw_projections_in(part, generator)
            if weight is None:
                continue
            projection = isinstance(part, nn.Linear) or (type(part).__name__ == "Conv1D" and weight.dim() == 2)
            norm = weight.dim() == 1 and "norm" in type(part).__name__.lower()
            if projection:
                fan_in = weight.shape[1] if isinstance(part, nn.Linear) else weight.shape[0]
                size = 0.0 if "lora_B" in name.split(".") else GAIN / fan_in**0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
            elif norm:
                _neutralise(part, weight)
            if (projection or norm) and bias is not None:
                bias.zero_()
    return copied


def _redraw_projections_in(attention: nn.MultiheadAttention, generator: torch.Generator) -> None:
    """Those of queries, keys and values, which are parameters of nn.MultiheadAttention itself."""
    import torch

    for name, parameter in attention.named_parameters(recurse=False):
        if name.endswith("proj_weight"):  # in_proj_weight, or q_, k_ and v_proj_weight
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (GAIN / parameter.shape[1] ** 0.5))
        elif name == "in_proj_bias":
            parameter.zero_()


def _neutralise(norm: Any, weight: Tensor) -> None:
    """Give a norm the gain 1, stored as 1 or, in norms that multiply by 1 + weight, as 0."""
    import torch

    weight.fill_(1.0)
    probe = torch.ones(2, 3, weight.shape[0], dtype=weight.dtype, device=weight.device)
    probe[..., ::2] = -1.0
    try:
        gain = float(norm(probe).double().square().mean().sqrt())
    except Exception:  # a norm with further inputs, such as a gate: one is the common convention
        return
    if gain > 1.5:
        weight.zero_()


def _check_spread(ctx: Context, drawn: Specimen, scores: list[traces.Scores]) -> None:
    spreads = [_spread(found) for found in scores]
    ctx.note("attention score spread by layer (projections re-drawn): " + " ".join(f"{s:.3g}" for s in spreads))
    for found, spread in zip(scores, spreads):
        size = found.head_dim or head_dim(drawn)
        if size is None or not math.isfinite(spread):
            continue
        expected = GAIN**2 * stated_scale(drawn.module, size, found.block) * size**0.5
        ctx.within(
            spread,
            expected * size**0.25,  # half way, by ratio, between scaled and unscaled
            f"attention scores spread {spread / expected:.3g} times as far as scores divided by sqrt({size}) do",
            where=f"block {found.block}" if found.block >= 0 else "",
            hint=Hint(
                f"the factor 1/sqrt(head_dim) = {size**-0.5:.3g} is missing, or taken of the wrong size",
                "attention.unscaled",
            ),
        )


def _spread(found: traces.Scores) -> float:
    """Standard deviation over keys of what is particular to a sequence, the median over heads and rows.

    Rows that see fewer than 8 keys are left out; a bias that is the same for every sequence is subtracted.
    """
    import torch

    seen = found.visible.expand_as(found.values)
    count = seen.sum(-1, keepdim=True)
    values = torch.where(seen, found.values.double(), 0.0)
    values = torch.where(seen, values - values.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    batch = values.shape[0]
    particular = (values - values.mean(0, keepdim=True)) * (batch / (batch - 1)) ** 0.5
    particular = torch.where(seen, particular, 0.0)
    deviation = (particular.square().sum(-1) / (count[..., 0] - 1).clamp(min=1)).sqrt()
    enough = deviation[(count[..., 0] >= 8).expand_as(deviation)]
    return float(enough.median()) if enough.numel() else math.nan


def head_dim(subject: Specimen) -> int | None:
    """The size of a head as the config states it."""
    config = subject.config
    for name in ("head_dim", "d_head", "d_kv"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    width = structure.stated(subject.module, ("hidden_size", "n_embd", "d_model", "width"))
    heads = structure.stated(subject.module, ("num_attention_heads", "n_head", "n_heads", "heads"))
    return width // heads if width and heads else None


def stated_scale(module: Any, size: int, block: int) -> float:
    """The factor on q.k that the config states under a name known from transformers, else 1/sqrt(size)."""
    config = structure.config_of(module)
    stated = getattr(config, "attention_multiplier", None)  # Granite, and the models that follow it
    if isinstance(stated, int | float):
        return float(stated)
    scalar = getattr(config, "query_pre_attn_scalar", None)  # Gemma
    if isinstance(scalar, int | float) and scalar > 0:
        return float(scalar) ** -0.5
    inner = getattr(getattr(config, "attn_config", None), "softmax_scale", None)  # MPT
    if isinstance(inner, int | float):
        return float(inner)
    scale = 1.0 if getattr(config, "scale_attn_weights", True) is False else size**-0.5  # GPT-2
    return scale / (block + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


def _check_entropy(ctx: Context, scores: list[traces.Scores]) -> None:
    entropies = [entropy_of(found) for found in scores]
    if entropies:
        lines = {"the model": entropies}
        ctx.record(charts.curves("Attention entropy by layer", "layer", "share of the largest", lines))
    ctx.note("attention entropy by layer, of the largest possible: " + " ".join(f"{e:.3g}" for e in entropies))
    for found, entropy in zip(scores, entropies):
        if entropy < SATURATED:
            ctx.fail(
                f"attention is saturated: its entropy is {entropy:.2g} of the largest possible, over all heads "
                "and rows",
                where=f"block {found.block}" if found.block >= 0 else "",
                measured=entropy,
                allowed=SATURATED,
                hint=Hint(
                    "scores are so large that each row sees one token and no gradient flows: look at the scale of the "
                    "scores, the initialisation of q and k, or a mask that leaves one key",
                    "attention.unscaled",
                ),
            )


def entropy_of(found: traces.Scores) -> float:
    """Mean over heads and rows (of 4 keys and up) of the entropy, as a share of log(number of keys)."""

    seen = found.visible.expand_as(found.values)
    count = seen.sum(-1)
    log_weights = found.values.double().masked_fill(~seen, -1e300).log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights.clamp(min=-1e4)).sum(-1)
    enough = count >= 4
    if not bool(enough.any()):
        return math.nan
    return float((entropy / count.clamp(min=2).log())[enough].mean())


def _check_influence(ctx: Context, subject: Specimen, attending: list[int]) -> None:
    """Every block at once: row i + 1 of the batch has its earlier tokens replaced on entering block i."""
    import torch

    found = structure.blocks(subject.module)
    if found is None:
        return
    name, blocks = found
    time = subject.longest(12)
    shares: dict[int, float] = {}
    for start in range(0, len(attending), LONGEST_BATCH):
        chosen = attending[start : start + LONGEST_BATCH]
        ids = ctx.ids(1, time).expand(len(chosen) + 1, -1).contiguous()

        def replaces(row: int, ids: Tensor = ids) -> Any:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                def swap(value: Any) -> Any:
                    if not (isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[:2] == ids.shape):
                        return value
                    if not value.is_floating_point():
                        return value
                    changed = value.clone()
                    changed[row, :-1] = -value[row, :-1].roll(1, dims=0)
                    return changed

                return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

            return hook

        def reads(index: int, row: int, ids: Tensor = ids) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                state = traces.hidden_in(output if isinstance(output, tuple | list) else (output,), ids)
                if state is not None:
                    last = state[:, -1].double()
                    shares[index] = float((last[row] - last[0]).norm() / last[0].norm().clamp(min=1e-300))

            return hook

        with traces.hooked(
            *(blocks[i].register_forward_pre_hook(replaces(row + 1), with_kwargs=True) for row, i in enumerate(chosen)),
            *(blocks[i].register_forward_hook(reads(i, row + 1)) for row, i in enumerate(chosen)),
        ):
            subject.logits(ids)
    ctx.note("share of a block's output that earlier tokens decide: " + " ".join(f"{s:.2g}" for s in shares.values()))
    floor = max(IDLE, tolerance.FACTOR * tolerance.epsilon(subject.dtype))
    for index, share in shares.items():
        if share <= floor:
            ctx.fail(
                f"attention is gated off: other tokens before it change the block's last output by {share:.2g} of its "
                f"size, {floor:.2g} at least is expected",
                where=f"{name}.{index}",
                hint=Hint(
                    "a gate at 0, an output projection of zeros, a mask that leaves each token only itself, or an "
                    "attention result that is never added to the residual",
                    "attention.gated_off",
                ),
            )
