"""The cross-entropy that loss.* compares with, and the usual ways of getting another number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.context import Hint
from lmconform.conventions import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

__all__ = ["IGNORED", "cross_entropy", "explain", "rounding", "token_losses"]


def cross_entropy(logits: Tensor, labels: Tensor, shifted: bool, ignored: int) -> Tensor:
    """Mean over the labels that count, float64, differentiable, without torch's own cross_entropy."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    lost, live = token_losses(logits, labels, ignored)
    return lost.sum() / live.sum()


def token_losses(logits: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """-log p of each label, 0 where it does not count, and where it counts."""
    wide = logits.double()
    live = labels != ignored
    chosen = wide.gather(-1, labels.clamp(0, wide.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return (wide.logsumexp(-1) - chosen) * live, live


def rounding(loss: Tensor, logits: Tensor) -> float:
    """The bound for the loss: the suite's factor times one unit in the last place of its largest term, a logit."""
    return tolerance.FACTOR * tolerance.epsilon(loss.dtype) * max(1.0, float(logits.detach().abs().max()))


def explain(
    subject: Specimen,
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignored: int,
    within: float,
    *,
    shifted: bool | None = None,
) -> tuple[str, str]:
    """Which common mistake gives exactly this loss: the hint, and words for the message. Empty words where none.

    `shifted`: the model is to shift `labels` itself; by default as its convention says.
    """
    value = float(loss.detach())
    logits = logits.detach()
    if shifted is None:
        shifted = subject.convention.labels_shifted
    lost, live = token_losses(logits[:, :-1], labels[:, 1:], ignored)
    straight, straight_live = token_losses(logits, labels, ignored)
    twice, twice_live = token_losses(logits[:, :-2], labels[:, 2:], ignored)
    back, back_live = token_losses(logits[:, 1:], labels[:, :-1], ignored)
    scores, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    end_to_end, end_to_end_live = token_losses(scores.flatten(0, 1)[:-1], wanted.flatten()[1:], ignored)
    if not shifted:  # the caller has shifted: none is right, one is one too many
        lost, live, twice, twice_live = straight, straight_live, lost, live
    right = "logits[:, :-1] with labels[:, 1:]" if shifted else "logits with the shifted labels, position by position"
    rows = lost.sum(-1) / live.sum(-1)
    candidates: list[tuple[Any, str, str]] = []
    if shifted:
        candidates.append((
            straight.sum() / straight_live.sum(),
            "it equals the one without the shift",
            Hint(
                "position t must be compared with label t + 1: logits[:, :-1] with labels[:, 1:]; as it stands the "
                "model learns to copy its input",
                "loss.unshifted",
            ),
        ))  # fmt: skip
    else:
        candidates.append((
            straight[:, :-1].sum() / straight_live[:, :-1].sum(),
            "it equals the one without the last position",
            Hint(
                "labels that are shifted already have one for the last position too: compare logits and labels as they "
                "stand, cut off nothing",
                "loss.shift_labels_ignored",
            ),
        ))  # fmt: skip
    candidates += [
        (
            twice.sum() / twice_live.sum(),
            "it equals the one with one shift too many",
            Hint(
                "labels are shifted by the caller and again in the model (or twice in the model): shift once",
                "loss.double_shift",
            ),
        ),
        (
            end_to_end.sum() / end_to_end_live.sum() if len(labels) > 1 else float("nan"),  # one row is as above
            "it equals the one with one shift too many, over rows laid end to end",
            Hint(
                "labels are shifted and flattened for a loss that shifts by itself: each row's last position is "
                "compared with the next row, all others with the token after the next; let one of the two shift",
                "loss.double_shift",
                "loss.misaligned",
            ),
        ),
        (
            back.sum() / back_live.sum(),
            "it equals the one shifted the wrong way",
            Hint(
                f"position t is compared with label t - 1, which it has seen: {right}",
                "loss.unshifted",
            ),
        ),
        (
            lost.sum() / live.numel(),
            "it equals the sum divided by all positions, ignored ones too",
            Hint(
                f"divide by the number of labels that are not {ignored}: a mean over [batch, time] dilutes short rows",
                "loss.normalisation",
            ),
        ),
        (
            lost.sum() / labels.numel(),
            "it equals the sum divided by batch * time",
            Hint(f"divide by the number of labels that are not {ignored}, after the shift", "loss.normalisation"),
        ),
        (
            rows[live.any(-1)].mean(),
            "it equals the mean of the rows' means",
            Hint(
                "every label counts the same: sum over all rows first, then divide by the number of labels",
                "loss.normalisation",
            ),
        ),
        (
            token_losses(logits, labels.clamp(min=0), ignored)[0].mean()
            if not shifted
            else token_losses(logits[:, :-1], labels[:, 1:].clamp(min=0), ignored)[0].mean(),
            f"it equals the one that takes {ignored} for token 0",
            Hint(
                f"labels {ignored} belong neither in the sum nor in the count; clamping them to 0 is only for the "
                "gather",
                "loss.ignore_index",
            ),
        ),
        (
            lost.sum(),
            "it equals the sum over the labels",
            Hint("divide by the number of labels that count", "loss.normalisation"),
        ),
        (
            (lost.sum() / live.sum()) / 0.6931471805599453,
            "it equals the cross-entropy in bits",
            Hint("a logarithm to base 2; optimizers and thresholds expect nats", "loss.normalisation"),
        ),
    ]
    # one row is right in either order
    crossed, crossed_live = token_losses(scores.transpose(0, 1).flatten(0, 1), wanted.flatten(), ignored)
    candidates.append((
        crossed.sum() / crossed_live.sum() if len(labels) > 1 else float("nan"),
        "it equals the one that takes logits time step by time step and labels row by row",
        Hint(
            "logits [time, batch, vocab] and labels [batch, time] are flattened as they lie: right for one row; bring "
            "both into one order first",
            "loss.misaligned",
        ),
    ))  # fmt: skip
    for name, token in structure.special_ids(subject.module).items():
        kept = live & ((labels[:, 1:] if shifted else labels) != token)
        candidates.append((
            (lost * kept).sum() / kept.sum(),
            f"it equals the one without labels {token} ({name})",
            Hint(
                f"{IGNORED} marks what does not count, not {name}: where pad and eos are one token the model never "
                "learns to stop",
                "loss.ignore_index",
                "tokenizer.pad_is_eos",
            ),
        ))  # fmt: skip
    for candidate, what, hint in candidates:
        if abs(float(candidate) - value) <= within:
            return hint, f": {what}"
    return (
        Hint(
            f"compare forward()'s loss with F.cross_entropy of {right}, flattened: look for label smoothing, a "
            f"scaled or a second loss term, or labels {ignored} that count",
            "loss.normalisation",
            "loss.smoothing_wrong",
            "loss.ignore_index",
        ),
        "",
    )
