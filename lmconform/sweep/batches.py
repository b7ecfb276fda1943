"""What one step of training sees: ids and targets, and the logits and loss of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform.capabilities import as_given

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """ids [rows, time]; targets [rows, time]: what the logits at each place should say, -100 where nothing."""

    ids: Tensor
    targets: Tensor


Batches = Callable[[int, int], Batch]  # of step and seed
Loss = Callable[["Tensor", "Tensor"], "Tensor"]  # of logits and targets as they stand


def next_token(ids: Tensor) -> Batch:
    """Ids [rows, time] and the token after each as its target."""
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    return Batch(ids, targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all targets; logits [rows, time, vocab]."""
    from torch.nn import functional as F

    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def logits_of(specimen: Specimen, batch: Batch, labels: bool) -> Tensor:
    output = specimen.forward(
        batch.ids, train=True, grad=True, use_cache=False, labels=given_labels(specimen, batch) if labels else None
    )
    return output.logits


def given_labels(specimen: Specimen, batch: Batch) -> Tensor:
    """The batch's labels as that model wants them: shifted by itself (Hugging Face), or as they stand."""
    return batch.ids if specimen.convention.labels_shifted else as_given(specimen, batch.targets)
