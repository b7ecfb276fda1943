"""collapse: after training with the recipe's own data and loss the model still speaks the corpus' language."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lmconform import charts
from lmconform.checks.shared_sweep import good_rate, trainable_size
from lmconform.context import Hint
from lmconform.registry import register_check
from lmconform.sweep.corpus import end_of_text, entropy, rule_corpus

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

REQUIRES = ("contract.shape", "contract.finite")
STEPS = 100
LOOKS = 5  # steps from one look at the predicted shares to the next
ROWS, TIME = 4, 16  # of the corpus made by rule
EOS_TIMES = 2.0  # how many times its true frequency the end-of-text token may be predicted
SLACK = 0.05  # of probability: what so few steps may leave
TOP_TIMES = 2.0
SPREAD = 0.5  # of the corpus' own effective number of tokens, exp(entropy)
SAMPLES, LENGTH = 16, 16
DISTINCT = 0.5  # of the corpus' own share of distinct pairs
REPEATS = 0.25  # above the corpus' own share of tokens that repeat the one before


@dataclass(frozen=True)
class Example:
    """ids, labels [rows, time] as the loss wants them, mask; `text`: the tokens that are text, without padding."""

    ids: Tensor
    labels: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Trained:
    """What training came to. `shares` [vocab]: the mean prediction where labels count; `corpus` [vocab]: the text's.

    `course` holds the mean prediction [vocab] in training, every LOOKS steps.
    """

    specimen: Specimen
    shares: Tensor
    corpus: Tensor
    text: list[list[int]]
    said_of: str
    rate: float
    course: list[Tensor]


_trained: weakref.WeakKeyDictionary[Specimen, dict[tuple[int, str], Trained]] = weakref.WeakKeyDictionary()


@register_check(
    "collapse.tokens",
    holds="after training: EOS share, top-token share, coverage and entropy of predictions are near the corpus' own",
    needs=("rebuild",),
    requires=REQUIRES,
)
def check_tokens(subject: Specimen, ctx: Context) -> None:
    """100 steps of AdamW at the swept rate on the recipe's batches with the recipe's loss; what is not given is a
    corpus made by rule, and cross-entropy.

    The mean prediction over all places that are trained must be near the frequencies of the text itself, padding left
    out. A model that knows nothing but these frequencies passes; one that says a token far more often does not.
    """
    found = trained(subject, ctx)
    shares, corpus = found.shares, found.corpus
    end = end_of_text(subject)
    ctx.record(_course(found, end))
    text = f"of {found.said_of}"
    spread, own = math.exp(_entropy(shares)), math.exp(_entropy(corpus))
    top = int(shares.argmax())
    coverage = int((shares > 0.1 * corpus.clamp(min=1e-12))[corpus > 0].sum()) / max(1, int((corpus > 0).sum()))
    ended = "" if end is None else f"EOS {float(shares[end]):.1%} ({float(corpus[end]):.1%}), "
    ctx.note(
        f"predicted (and {text}): {ended}top token {float(shares[top]):.1%} ({float(corpus.max()):.1%}), "
        f"effective tokens {spread:.1f} ({own:.1f}), coverage {coverage:.0%}"
    )
    if end is not None:
        ctx.within(
            float(shares[end]), max(EOS_TIMES * float(corpus[end]), float(corpus[end]) + SLACK),
            f"after {STEPS} steps the end-of-text token has {float(shares[end]):.1%} of the predicted probability; "
            f"it is {float(corpus[end]):.1%} {text}",
            where=f"token {end}",
            hint=Hint("the labels hold far more ends than the text (padding that is labelled with EOS, empty examples, "
            "rolled targets: see collapse.labels), or the loss weighs EOS up", "collapse.eos", "data.eos_pollution"),
        )  # fmt: skip
    ctx.within(
        float(shares[top]), max(TOP_TIMES * float(corpus.max()), float(corpus.max()) + SLACK),
        f"after {STEPS} steps one token has {float(shares[top]):.1%} of the predicted probability; the most frequent "
        f"one is {float(corpus.max()):.1%} {text}",
        where=f"token {top}",
        hint=Hint("a term of the loss rewards saying one token: a diversity term with the wrong sign, or one that has "
        "saturated and left the rest to pull alone; or the labels are mostly that token", "collapse.single_token"),
    )  # fmt: skip
    if spread < SPREAD * own:
        ctx.fail(
            f"after {STEPS} steps the predictions spread over {spread:.1f} tokens, the corpus over {own:.1f}: "
            "most of the vocabulary is never said",
            measured=own / spread,
            allowed=1 / SPREAD,
            hint=Hint(
                "the loss sharpens the prediction, or whole classes of tokens never are labels", "collapse.single_token"
            ),
        )


@register_check(
    "collapse.samples",
    holds="samples after training: distinct-n and repetition near the corpus' own",
    needs=("rebuild",),
    requires=REQUIRES,
)
def check_samples(subject: Specimen, ctx: Context) -> None:
    """16 samples of 16 tokens, drawn at temperature 1 by plain forwards, from the model that collapse.tokens trained.

    They begin with the first token of a text. Measured: the share of distinct pairs, and of tokens that repeat the one
    before, beside the same of as much text.
    """
    import torch

    found = trained(subject, ctx)
    if min(map(len, found.text)) < 1:
        ctx.not_applicable("the texts are empty")
    starts = torch.tensor([found.text[index % len(found.text)][:1] for index in range(SAMPLES)])
    ids = starts.to(subject.device)
    generator = ctx.generator(31)
    while ids.shape[1] < subject.longest(LENGTH + 1):
        chances = found.specimen.logits(ids)[:, -1].double().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator).to(ids)], 1)
    samples = ids[:, 1:].tolist()
    text = _like(found.text, SAMPLES, len(samples[0]))
    distinct, own = _distinct(samples), _distinct(text)
    repeats, usual = _repeats(samples), _repeats(text)
    ctx.note(f"distinct pairs {distinct:.0%} (corpus {own:.0%}), repeats {repeats:.0%} (corpus {usual:.0%})")
    ctx.within(
        repeats,
        usual + REPEATS,
        f"samples of the trained model repeat the token before {repeats:.0%} of the time; "
        f"{found.said_of} does {usual:.0%} of the time",
        hint=Hint(
            "the model has learnt to copy what it sees, the target itself (no causal mask), or says one token",
            "training.label_leak",
            "mask.missing",
        ),
    )
    if distinct < DISTINCT * own:
        ctx.fail(
            f"samples of the trained model hold {distinct:.0%} distinct pairs of tokens, {found.said_of} {own:.0%}",
            measured=own / max(distinct, 1e-9),
            allowed=1 / DISTINCT,
            hint=Hint(
                "the predictions have collapsed to a few tokens; collapse.tokens says which",
                "collapse.single_token",
                "collapse.eos",
            ),
        )


# -- training ------------------------------------------------------------------------------------------------------


def trained(subject: Specimen, ctx: Context) -> Trained:
    """The subject trained on its recipe's data and loss, once a seed. Raises Unavailable where it is too large."""
    trainable_size(subject, ctx)
    kept = _trained.setdefault(subject, {})
    key = (ctx.seed, ctx.profile)
    if key not in kept:
        kept[key] = _train(subject, ctx)
    return kept[key]


def _train(subject: Specimen, ctx: Context) -> Trained:
    import torch

    from lmconform.measuring.dropout import without_dropout
    from lmconform.sweep.batches import cross_entropy

    own = getattr(subject.recipe, "loss", None)
    shifts = _shifts(subject, own, ctx.ids(2, 4)) if own is not None else subject.convention.labels_shifted
    examples, said_of = _data(subject, ctx, shifts)
    rate = good_rate(subject, ctx)
    copy = without_dropout(subject.fresh(ctx.seed))
    live = [parameter for parameter in copy.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=rate)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if own is not None:
            return own(logits, labels)
        return cross_entropy(logits[:, :-1], labels[:, 1:]) if shifts else cross_entropy(logits, labels)

    course: list[Tensor] = []
    for step in range(STEPS):
        example = examples[step % len(examples)]
        optimizer.zero_grad()
        logits = _logits(copy, example, train=True)
        if step % LOOKS == 0:
            course.append(logits.detach()[_counted(example, shifts)].softmax(-1).mean(0))
        value = loss(logits, example.labels)
        if not bool(value.isfinite()):
            ctx.fail(
                f"the loss is {float(value)} at step {step} of training at rate {rate:.2g}",
                hint="the recipe's loss leaves its range: a logarithm of zero, or a division by the number of labels",
            )
        if value.requires_grad:
            value.backward()
            optimizer.step()
    shares, text = torch.zeros(subject.vocab_size, dtype=torch.float64), torch.zeros(subject.vocab_size)
    rows: list[list[int]] = []
    for example in examples[:16]:
        chances = _logits(copy, example, train=False).detach().double().softmax(-1)
        shares += chances[_counted(example, shifts)].sum(0).cpu()
    for example in examples:
        for index, row in enumerate(example.ids.tolist()):
            seen = example.mask[index].tolist() if example.mask is not None else [1] * len(row)
            rows.append([token for token, there in zip(row, seen, strict=True) if there])
    for row in rows:
        text += torch.bincount(torch.tensor(row[1:] or row, dtype=torch.long), minlength=len(text))
    return Trained(
        copy, shares / shares.sum(), text.double() / text.sum(), [row for row in rows if row] or [[]], said_of, rate,
        course,
    )  # fmt: skip


def _counted(example: Example, shifts: bool) -> Tensor:
    """Places whose prediction is trained: the label after them counts (their own, where the loss does not shift)."""
    import torch

    if not shifts:
        return example.labels >= 0
    counted = torch.zeros_like(example.labels, dtype=torch.bool)
    counted[:, :-1] = example.labels[:, 1:] >= 0
    return counted


def _shifts(subject: Specimen, loss: Any, ids: Tensor) -> bool:
    """Whether a loss compares logits with the label after them: then the last place's logits do not matter to it."""
    import torch

    logits = torch.randn((*ids.shape, subject.vocab_size), generator=torch.Generator().manual_seed(0)).to(ids.device)
    other = logits.clone()
    other[:, -1] = other[:, -1].roll(1, dims=-1) * 2
    return bool(torch.equal(loss(logits, ids), loss(other, ids)))


def _logits(specimen: Specimen, example: Example, *, train: bool) -> Tensor:
    mask = example.mask if specimen.can("mask") else None
    return specimen.forward(example.ids, mask=mask, train=train, grad=train, use_cache=False).logits


def _data(subject: Specimen, ctx: Context, shifts: bool) -> tuple[list[Example], str]:
    """The recipe's first batches, cut to the context; else windows of the corpus made by rule."""
    recipe = subject.recipe
    if getattr(recipe, "batches", None) is not None or getattr(recipe, "collate", None) is not None:
        examples = [_example(subject, batch) for batch in recipe.read(limit=64)]
        examples = [example for example in examples if example.ids.numel()]
        if not examples:
            ctx.not_applicable("the recipe's batches are empty")
        largest = max(int(example.ids.max()) for example in examples)
        if largest >= subject.vocab_size:
            ctx.not_applicable(f"the recipe's batches hold token {largest}; the model has {subject.vocab_size}")
        if not any(bool((example.labels >= 0).any()) for example in examples):
            ctx.not_applicable("no label of the recipe's batches counts")
        return examples, "the recipe's text"
    corpus = rule_corpus(subject, ctx.seed)
    batches = corpus.batches(subject, ROWS, TIME)
    drawn = [batches(step, ctx.seed) for step in range(STEPS)]
    return [Example(batch.ids, batch.ids if shifts else batch.targets, None) for batch in drawn], corpus.name


def _example(subject: Specimen, batch: Any) -> Example:
    time = subject.longest(batch.ids.shape[1])
    ids = batch.ids[:, :time].to(subject.device)
    mask = None if batch.mask is None else batch.mask[:, :time].to(subject.device)
    labels = ids if batch.labels is None else batch.labels[:, :time].to(subject.device)
    return Example(ids, labels, mask)


# -- figures -------------------------------------------------------------------------------------------------------


def _course(found: Trained, end: int | None) -> charts.Curves:
    """Shares of the predicted probability over training, beside those of the text."""
    lines = {
        "most likely token": [float(shares.max()) for shares in found.course],
        "most frequent one in the text": [float(found.corpus.max())] * len(found.course),
    }
    if end is not None:
        lines["end, predicted"] = [float(shares[end]) for shares in found.course]
        lines["end, in the text"] = [float(found.corpus[end])] * len(found.course)
    steps = range(0, STEPS, LOOKS)
    return charts.curves("Token shares over training", "step", "share predicted", lines, x=steps)


def _entropy(shares: Tensor) -> float:
    return entropy(shares.tolist())


def _like(text: Sequence[Sequence[int]], count: int, length: int) -> list[list[int]]:
    """As many pieces of text, of about the same length."""
    flat = [token for row in text for token in row]
    starts = range(0, max(1, len(flat) - length), max(1, (len(flat) - length) // count))
    return [flat[start : start + length] for start in starts][:count]


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    return len(pairs) / max(1, pairs.total())


def _repeats(rows: Sequence[Sequence[int]]) -> float:
    pairs = [left == right for row in rows for left, right in pairwise(row)]
    return sum(pairs) / max(1, len(pairs))
