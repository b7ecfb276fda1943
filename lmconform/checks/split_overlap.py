"""What collapse.labels finds beside the labels: padding in a batch, and validation data that is training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform.context import Hint
from lmconform.recipe import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.recipe import Recipe

BATCHES = 64  # of each split are looked at
OVERLAP = 0.05  # of the validation examples: short sentences coincide by chance
WINDOW, WINDOWS = 64, 100_000  # tokens of a passage that is looked for in both splits; how many are
LONG = 8  # ordinary tokens from which two examples are not alike by chance


@dataclass(frozen=True)
class Finding:
    message: str
    hint: str
    measured: float | None = None
    allowed: float | None = None
    where: str = ""


@dataclass(frozen=True)
class Specials:
    """Ids that are no text; None where there is none."""

    pad: int | None
    bos: int | None
    eos: int | None
    unk: int | None

    def known(self) -> list[int]:
        return [token for token in (self.pad, self.bos, self.eos) if token is not None]


def padding_of(batch: Batch, specials: Specials) -> Tensor:
    """Where a token is padding: by the mask, by a pad id of its own, else what follows the first of the last EOS."""
    import torch

    ids = batch.ids
    padded = torch.zeros_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask == 0
    if specials.pad is not None and specials.pad not in (specials.eos, specials.bos, specials.unk):
        return padded | (ids == specials.pad)
    if batch.mask is None and specials.eos is not None:
        trailing = (ids == specials.eos).flip(1).long().cumprod(1).flip(1).bool()
        trailing[:, 1:] &= trailing[:, :-1].clone()  # the first of them is the end itself
        trailing[:, 0] = False
        return padded | trailing
    return padded


def leak(ctx: Context, recipe: Recipe, batches: list[Batch], specials: Specials) -> Finding | None:
    if recipe.validation is None:
        return None
    hint = Hint(
        "split by document before cutting into windows or shuffling, with a fixed seed, and drop duplicates first: "
        "validation loss otherwise measures memory",
        "data.split_leak",
    )
    held = recipe.validation
    if recipe.texts is not None and isinstance(held, list | tuple) and held and isinstance(held[0], str):
        known = {text.strip() for text in recipe.texts}
        shared = sum(text.strip() in known for text in held)
        rows = len(held)
    else:
        validation = recipe.read_validation(BATCHES)
        train = {row for batch in batches for row in _texts(batch, specials)}
        theirs = [row for batch in validation for row in _texts(batch, specials)]
        shared, rows = sum(row in train for row in theirs), len(theirs)
        part = _shared_passages(batches, validation)
        if shared <= OVERLAP * rows and part > OVERLAP:
            return Finding(
                f"{part:.0%} of the validation passages of {WINDOW} tokens stand in the training data too",
                hint,
                measured=part,
                allowed=OVERLAP,
            )
    if not rows:
        ctx.note("no validation example is long enough to be looked for in the training data")
        return None
    if shared > OVERLAP * rows:
        return Finding(
            f"{shared} of {rows} validation examples are training examples too",
            hint,
            measured=shared / rows,
            allowed=OVERLAP,
        )
    return None


def _texts(batch: Batch, specials: Specials) -> list[tuple[int, ...]]:
    """The rows without padding and special tokens, those long enough not to coincide."""
    special, padded = set(specials.known()), padding_of(batch, specials).tolist()
    rows = [
        tuple(token for token, off in zip(row, gone) if not off and token not in special)
        for row, gone in zip(batch.ids.tolist(), padded)
    ]
    return [row for row in rows if len(row) >= LONG]


def _shared_passages(train: list[Batch], validation: list[Batch]) -> float:
    """The share of the validation's passages that occur in training at any place, by a hash of each."""
    import torch

    weights = torch.randint(1, 1 << 60, (WINDOW,), generator=torch.Generator().manual_seed(0))

    def hashes(batches: list[Batch]) -> Tensor:
        made, count = [torch.empty(0, dtype=torch.long)], 0
        for batch in batches:
            if batch.ids.shape[1] < WINDOW or count > WINDOWS:
                continue
            windows = batch.ids.unfold(1, WINDOW, 1)
            # a run of one token (padding, blank lines) is no passage
            text = (windows != windows[..., :1]).any(-1)
            if batch.mask is not None:
                text = text & batch.mask.unfold(1, WINDOW, 1).bool().all(-1)
            made.append((windows * weights).sum(-1)[text])
            count += len(made[-1])
        return torch.cat(made)

    theirs = hashes(validation)
    if not len(theirs):
        return 0.0
    return float(torch.isin(theirs, hashes(train)).double().mean())
