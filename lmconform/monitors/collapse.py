"""CollapseMonitor: is the model falling onto one token, or onto the end of text, and do its labels ask it to?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.monitors.base import Moment, Monitor, number

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
EOS_TIMES = 2.0  # the mean prediction's share of EOS, over the corpus' own
EOS_FLOOR = 0.02
TOP_TIMES = 3.0
TOP_FLOOR = 0.2
ENTROPY_SHARE = 0.5  # of the corpus' own entropy, below which the mean prediction is too sharp
PATIENCE = 150  # steps that any model may spend on the most frequent token: it is learnt first
POSITIONS = 256  # looked at per observation


class CollapseMonitor(Monitor):
    """EOS share and rank, top-token share, vocabulary coverage and entropy, against the corpus' own.

    Measured on the training batches, from the mean of the predicted distributions: cross-entropy makes it equal to the
    labels' own token shares long before the model knows anything else, so it differs from the corpus only where
    something is wrong. `corpus`: token counts, or sequences of ids, of what the model should imitate; where it is not
    given, the batches' own real tokens stand for it: padding is left out, and of a run of EOS only the first counts.
    """

    wants_logits = True

    def __init__(
        self,
        *,
        eos_token_id: int | None = None,
        corpus: Counter[int] | Iterable[Sequence[int]] | None = None,
        patience: int = PATIENCE,
        every: int = 10,
        stop: bool = False,
        log: str | Path | None = None,
    ) -> None:
        super().__init__(every=every, stop=stop, log=log)
        self.eos = eos_token_id
        self.patience = patience
        self.given = corpus is not None
        self._counts: Tensor | None = None
        self._corpus: Counter[int] = Counter()
        if isinstance(corpus, Counter):
            self._corpus = Counter(corpus)
        elif corpus is not None:
            for row in corpus:
                self._corpus.update(row)
        self._label_eos = 0
        self._label_count = 0
        self._rows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.eos is None:
            tokenizer, config = kwargs.get("processing_class"), getattr(kwargs["model"], "config", None)
            self.eos = getattr(tokenizer, "eos_token_id", None)
            if self.eos is None:
                self.eos = _first(getattr(config, "eos_token_id", None))

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        """Looks at 256 positions spread over the batch."""
        loss = number(moment.loss)
        if loss is not None and not math.isfinite(loss):
            self._not_finite(moment, f"the loss is {loss}")
        if moment.logits is None:
            return None
        import torch

        with torch.no_grad():
            logits, labels = self._live(moment)
            if not len(logits):
                return None
            vocabulary = logits.shape[-1]
            corpus = self._shares(moment, vocabulary)
            predicted = logits.float().softmax(-1)
            mean, winners = predicted.mean(0), logits.argmax(-1)
            won = torch.bincount(winners, minlength=vocabulary)
            top = int(won.argmax())
            distinct = (won > 0).sum()
            entropy = -(mean * mean.clamp(min=1e-30).log()).sum()
            own = -(corpus * corpus.clamp(min=1e-30).log()).sum()
            loudest = mean.argmax()
            numbers = torch.stack(
                [
                    won[top] / len(winners), distinct.float(), entropy, own, mean[loudest], loudest.float(),
                    corpus[loudest], corpus.max(), corpus[top],
                ]
            ).tolist()  # fmt: skip
            top_share, seen, entropy_, own_, loud, loud_id, loud_own, corpus_top, top_own = numbers
        if not math.isfinite(entropy_):
            self._not_finite(moment, "the logits hold NaN or infinity")
            return {"entropy": entropy_}
        expected = int((torch.bincount(labels, minlength=vocabulary) > 0).sum()) if labels is not None else None
        figures: dict[str, Any] = {
            "top_token": top, "top_share": top_share, "corpus_top_share": corpus_top, "coverage": int(seen),
            "corpus_coverage": expected, "entropy": entropy_, "corpus_entropy": own_,
        }  # fmt: skip
        if self.eos is not None and self.eos < vocabulary:
            figures |= self._eos(moment, mean, corpus, labels)
        self._single(moment, top, top_share, top_own, int(loud_id), loud, loud_own, figures)
        return figures

    def _not_finite(self, moment: Moment, what: str) -> None:
        """At the first look: it does not pass, and every weight is lost with the next step."""
        self.warn(
            moment, "grad.exploding", what,
            "Stop the run and go back to the last checkpoint: look for a rate that is too large, an overflow in half "
            "precision, a division by a norm, or a mask that hides a whole row.",
        )  # fmt: skip

    # -- the parts -------------------------------------------------------------------------------------------------

    def _live(self, moment: Moment) -> tuple[Tensor, Tensor | None]:
        """Logits [n, vocab] of at most 256 counted positions, and the labels [all counted] there."""
        import torch

        assert moment.logits is not None
        logits = moment.logits[:, :-1]
        if moment.labels is not None:
            labels = moment.labels[:, 1:]
            counted = labels != IGNORED
        elif moment.attention_mask is not None and moment.attention_mask.dim() == 2:
            labels, counted = None, moment.attention_mask[:, -logits.shape[1] :].bool()
        else:
            labels, counted = None, torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        live = None if labels is None else labels[counted]
        places = counted.nonzero()
        if len(places) > POSITIONS:
            places = places[torch.linspace(0, len(places) - 1, POSITIONS, device=places.device).long()]
        return logits[places[:, 0], places[:, 1]], live

    def _shares(self, moment: Moment, vocabulary: int) -> Tensor:
        """The corpus' own token shares [vocab]; grown from the batches where no corpus was given."""
        import torch

        assert moment.logits is not None
        device = moment.logits.device
        if self._counts is None or len(self._counts) != vocabulary:
            self._counts = torch.zeros(vocabulary, device=device)
            for token, count in self._corpus.items():
                if 0 <= token < vocabulary:
                    self._counts[token] += count
        ids = moment.input_ids
        if not self.given and ids is not None and not ids.is_floating_point():
            real = torch.ones_like(ids, dtype=torch.bool)
            if moment.attention_mask is not None and moment.attention_mask.shape == ids.shape:
                real &= moment.attention_mask.bool()
            if self.eos is not None:
                real[:, 1:] &= ~((ids[:, 1:] == self.eos) & (ids[:, :-1] == self.eos))
            self._counts += torch.bincount(ids[real], minlength=vocabulary)[:vocabulary]
        elif not self.given and moment.labels is not None:
            live = moment.labels[moment.labels != IGNORED]
            self._counts += torch.bincount(live, minlength=vocabulary)[:vocabulary]
        return self._counts / self._counts.sum().clamp(min=1)

    def _eos(self, moment: Moment, mean: Tensor, corpus: Tensor, labels: Tensor | None) -> dict[str, Any]:
        import torch

        eos = self.eos
        assert eos is not None
        share, own, rank = torch.stack([mean[eos], corpus[eos], (mean > mean[eos]).sum().float()]).tolist()
        asked = None
        if labels is not None:
            assert moment.labels is not None
            self._label_eos += int((labels == eos).sum())
            self._label_count += len(labels)
            self._rows += len(moment.labels)
            if own == 0 and not self.given:  # the inputs end before it: one a row is what the labels may hold
                own = self._rows / max(1, self._label_count)
        figures: dict[str, Any] = {"eos_share": share, "eos_rank": int(rank) + 1, "corpus_eos_share": own}
        limit = max(EOS_TIMES * own, own + EOS_FLOOR, 2 / len(mean))
        if labels is not None:
            asked = self._label_eos / max(1, self._label_count)
            figures["label_eos_share"] = asked
            error = math.sqrt(max(own, 1e-3) / max(1, self._label_count))
            if asked > limit + 4 * error and self._label_eos >= 8:
                self.warn(
                    moment, "data.eos_pollution",
                    f"{asked:.0%} of the labels that count are EOS, and {own:.1%} of the real tokens",
                    "Padding or empty lines are labelled EOS: set labels to -100 where attention_mask is 0, drop empty "
                    "examples, do not roll labels, and mask by attention_mask, not by id, where pad is EOS.",
                    label_eos_share=asked, corpus_eos_share=own,
                )  # fmt: skip
        because = "" if asked is None or asked <= limit else f"; its labels ask for {asked:.0%}"
        if self.lasting("eos", share > limit and moment.step > 1):
            self.warn(
                moment, "collapse.eos",
                f"the mean prediction gives EOS {share:.0%} (rank {int(rank) + 1}), the corpus {own:.1%}{because}",
                "It will end at once when it generates: look at the labels (padding, empty lines), at an EOS weight in "
                "the loss, and at how prompts are encoded.",
                eos_share=share, eos_rank=int(rank) + 1, corpus_eos_share=own, label_eos_share=asked,
            )  # fmt: skip
        return figures

    def _single(
        self, moment: Moment, top: int, share: float, share_own: float, loud: int, loud_share: float, loud_own: float,
        figures: dict[str, Any],
    ) -> None:  # fmt: skip
        over = loud_share > max(TOP_TIMES * loud_own, loud_own + TOP_FLOOR)
        sharp = figures["entropy"] < ENTROPY_SHARE * figures["corpus_entropy"]
        if loud != self.eos and self.lasting("loud", over and sharp and moment.step > 1):
            self.warn(
                moment, "collapse.single_token",
                f"the mean prediction gives token {loud} {loud_share:.0%}, the corpus {loud_own:.1%} (entropy "
                f"{figures['entropy']:.2f} nats, the corpus' own {figures['corpus_entropy']:.2f})",
                "Look at the learning rate (has the run diverged?), at an extra term in the loss, and at the labels.",
                token=loud, share=loud_share, corpus_share=loud_own, entropy=figures["entropy"],
            )  # fmt: skip
        stuck = share > max(TOP_TIMES * share_own, 0.5) and moment.step >= self.patience
        name = "EOS" if top == self.eos else f"token {top}"
        if self.lasting("top", stuck, times=2):
            loss, floor = number(moment.loss), figures["corpus_entropy"]
            learnt = "" if loss is None else f", at a loss of {loss:.2f} (token shares alone reach {floor:.2f})"
            self.warn(
                moment, "collapse.eos" if top == self.eos else "collapse.single_token",
                f"{name} is the likeliest at {share:.0%} of the positions after {moment.step} steps{learnt}; it "
                f"is {share_own:.1%} of the corpus",
                "Only the token shares have been learnt: the rate is too small or its schedule dead, the body gets no "
                "gradient, or the attention does not see the context.",
                token=top, share=share, corpus_share=share_own,
            )  # fmt: skip


def _first(value: Any) -> int | None:
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return value if isinstance(value, int) else None
