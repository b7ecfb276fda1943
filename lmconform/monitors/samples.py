"""SampleMonitor: does the model still write something, and something else than it has just written?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.monitors.base import Moment, Monitor

if TYPE_CHECKING:
    from torch import nn

EMPTY = 0.5  # share of samples that end before their first token
REPETITION = 0.5  # share of 4-grams that repeat an earlier one of the same sample
PATIENCE = 150  # steps that any model may repeat itself: the most frequent tokens are learnt first

Sampler = Callable[["nn.Module"], Sequence[Sequence[int]]]


class SampleMonitor(Monitor):
    """Empty samples, distinct-1 and distinct-2 (Li et al. 2016), and repetition within a sample.

    A sample is a row of new ids, the prompt and EOS left out. They come from `sample(model)`, which is called at every
    look, in eval mode, without gradients and with a random state of its own, so that training goes on as without it
    (`generated` makes one for models that have generate()); or a hand-written loop gives them: `step(samples=rows)`.
    """

    def __init__(
        self,
        sample: Sampler | None = None,
        *,
        patience: int = PATIENCE,
        every: int = 50,
        stop: bool = False,
        log: str | Path | None = None,
    ) -> None:
        super().__init__(every=every, stop=stop, log=log)
        self.sample = sample
        self.patience = patience

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        samples = moment.samples
        if samples is None and self.sample is not None and moment.model is not None:
            samples = self._drawn(moment.model, moment.step)
        if samples is None:
            return None
        rows = [[int(token) for token in row] for row in samples]
        figures: dict[str, Any] = sample_figures(rows)
        empty, repeated = figures["empty"], figures["repetition"]
        if self.lasting("empty", empty is not None and empty > EMPTY, times=2):
            self.warn(
                moment, "collapse.eos",
                f"{empty:.0%} of its samples are empty: the first token is the end",
                "Look at the labels (padding, empty lines), at an EOS weight in the loss, and whether prompts are "
                "encoded with EOS behind them.",
                empty=empty,
            )  # fmt: skip
        late = moment.step > self.patience
        if self.lasting("repetition", repeated is not None and repeated > REPETITION and late):
            self.warn(
                moment, "collapse.single_token",
                f"{repeated:.0%} of the 4-grams of its samples repeat an earlier one of the same sample",
                "Sample with temperature to tell a collapsed model from greedy decoding, which repeats anyway.",
                repetition=repeated, distinct_2=figures["distinct_2"],
            )  # fmt: skip
        return figures

    def _drawn(self, model: nn.Module, step: int) -> Sequence[Sequence[int]]:
        import torch

        assert self.sample is not None
        inner = getattr(model, "module", model)  # DistributedDataParallel has no generate()
        places = {parameter.device for parameter in inner.parameters() if parameter.device.type == "cuda"}
        training = inner.training
        inner.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=sorted(places, key=str)):
                torch.manual_seed(step)
                return self.sample(inner)
        finally:
            inner.train(training)


def generated(
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_id: int | None,
    **settings: Any,
) -> Sampler:
    """A sampler by transformers' generate(): the continuations of these prompts (rows of ids), EOS and all after it
    left out. `settings` go to generate(); by default tokens are drawn at temperature 1, from the whole vocabulary.

    Raises ValueError for no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("samples need prompts of at least one token each: [[BOS]] is one")
    time = max(map(len, prompts))
    settings = {"do_sample": True, "top_k": 0, **settings}

    def sample(model: Any) -> list[list[int]]:
        import torch

        device = next(model.parameters()).device
        ids = torch.tensor([[pad_token_id] * (time - len(row)) + list(row) for row in prompts], device=device)
        mask = torch.tensor([[0] * (time - len(row)) + [1] * len(row) for row in prompts], device=device)
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id,
            eos_token_id=eos_token_id, **settings,
        )  # fmt: skip
        rows = made[:, time:].tolist()
        return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]

    return sample


def sample_figures(rows: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """The share of empty rows, distinct-1 and distinct-2 over all, and the share of repeated 4-grams per row.

    A figure is None where there is nothing to count: no rows, or rows too short for one n-gram.
    """

    def grams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]

    figures: dict[str, float | None] = {"empty": sum(not row for row in rows) / len(rows) if rows else None}
    for n in (1, 2):
        made = [gram for row in rows for gram in grams(row, n)]
        figures[f"distinct_{n}"] = len(set(made)) / len(made) if made else None
    fours = [grams(row, 4) for row in rows]
    total = sum(map(len, fours))
    figures["repetition"] = 1 - sum(len(set(four)) for four in fours) / total if total else None
    return figures
