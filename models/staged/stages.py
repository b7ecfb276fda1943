"""From one stage to the next: the new part starts as if it were not there."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from models.staged.credit import staged
from models.staged.modeling import StagedForCausalLM

TOLERANCE = 1e-5  # by how much a switch may move a logit, in units of the logits' standard deviation
NEW = ("model.embedding.time.", "model.projector.of_time.")


def at_stage(model: StagedForCausalLM, stage: int) -> StagedForCausalLM:
    """A copy of the model at a later stage (or at its own): its weights, and new parts that change nothing yet.

    `from_pretrained(checkpoint, stage=...)` does the same for a checkpoint. Raises ValueError for an earlier stage:
    what the later one has learnt would be lost.
    """
    if stage < model.config.stage:
        raise ValueError(f"the model is at stage {model.config.stage}: there is no way back to stage {stage}")
    config = copy.deepcopy(model.config)
    config.stage = stage
    config._attn_implementation = model.config._attn_implementation
    later = nn.Module.to(StagedForCausalLM(config), model.device, model.dtype)
    assert isinstance(later, StagedForCausalLM)
    found = later.load_state_dict(model.state_dict(), strict=False)
    strange = [name for name in found.missing_keys if not name.startswith(NEW)]
    if strange or found.unexpected_keys:
        raise ValueError(f"weights that do not fit: missing {strange}, unexpected {found.unexpected_keys}")
    later.generation_config = copy.deepcopy(model.generation_config)
    return later.train(model.training)


@torch.no_grad()
def jump(before: nn.Module, after: nn.Module, input_ids: Tensor) -> float:
    """The largest change of a logit between two models on ids [batch, time], over the logits' standard deviation."""
    modes = before.training, after.training
    try:
        one, other = (model.eval()(input_ids=input_ids).logits.double() for model in (before, after))
    finally:
        before.train(modes[0])
        after.train(modes[1])
    return float((one - other).abs().max() / one.std())


@dataclass
class GraphClosing(TrainerCallback):
    """Stage 3 begins with dense attention: what a token without an edge counts goes to 0 over `steps`, in a line.

    The config's `graph_openness` is set before every optimizer step, from what it was at the start; a run that is
    resumed finds its place by the step. Raises ValueError for less than one step.
    """

    steps: int
    _start: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: the graph closes over at least one step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close(kwargs["model"], state.global_step)  # evaluation and checkpoints see what the next step will

    def _close(self, model: nn.Module, step: int) -> None:
        config = staged(model).config
        if self._start is None:
            self._start = float(config.graph_openness)
        config.graph_openness = self._start * max(0.0, 1 - step / self.steps)
