"""Label smoothing that works for any class, and a Trainer whose evaluation is plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from models.training.data import IGNORED


def smoothed(epsilon: float) -> Callable[..., Tensor]:
    """Cross-entropy against (1 - epsilon) one-hot + epsilon / vocab (Szegedy et al. 2016), for `compute_loss_func`.

    The shift is made here: the Trainer's own smoothing shifts only classes that transformers lists itself, and leaves a
    model of one's own to predict the token it was given. -100 is not counted; `num_items_in_batch` is the number of
    labels over all micro-batches of an optimizer step.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        flat, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        total = nn.functional.cross_entropy(
            flat, target, ignore_index=IGNORED, label_smoothing=epsilon, reduction="sum"
        )
        counted = num_items_in_batch if num_items_in_batch is not None else (target != IGNORED).sum().clamp(min=1)
        return total / counted

    return loss


class PlainEvaluation(Trainer):
    """Trains on whatever loss it is given and evaluates on the model's own cross-entropy, so that runs compare."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training or self.compute_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss
