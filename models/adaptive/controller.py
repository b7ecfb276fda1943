"""HeadController: closes heads that do nothing, opens them again when they are missed.

A Trainer callback. Every figure is measured on the same probe batches, given once: under data parallelism every
process therefore comes to the same decision, and a decision can be made again from its record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from models.adaptive.modeling import AdaptiveAttention, AdaptiveForCausalLM

Batch = Mapping[str, Tensor]


@dataclass
class HeadFigures:
    """What was measured of every head, [L, H] each, on the CPU in float64; heads that are gone hold 0.

    - `entropy`: mean over batch and query of -sum p log p, in nats.
    - `uniformity`: that entropy over the one of uniform attention at the same queries, 0 to 1.
    - `gradient_norm`: norm of the loss' gradient with respect to the head's own weights (its columns of q, k and v,
      its rows of the output projection).
    - `importance`: rise of the loss when the head's gate is 0; for a closed head, the rise over the loss with its gate
      at 1. `loss` is the one with the gates as they are.
    """

    loss: float
    entropy: Tensor
    uniformity: Tensor
    gradient_norm: Tensor
    importance: Tensor


def measure_heads(model: AdaptiveForCausalLM, batches: Sequence[Batch]) -> HeadFigures:
    """Measure every head on these batches (input_ids, labels, attention_mask where there is padding).

    The mode, the gates and the gradients of the model are left as they were. Costs one forward with attention written
    out, one backward, and one forward per head.
    """
    with _evaluating(model):
        loss = _loss(model, batches)
        entropy, uniformity = _entropies(model, batches)
        norms = _gradient_norms(model, batches)
        importance = torch.zeros_like(entropy)
        for layer, head in _present(model):
            closed = bool(model.gates[layer, head] == 0)
            with _gate(model, layer, head, 1.0 if closed else 0.0):
                other = _loss(model, batches)
            importance[layer, head] = loss - other if closed else other - loss
    return HeadFigures(loss, entropy, uniformity, norms, importance)


@dataclass
class HeadController(TrainerCallback):
    """Closes gates after a warm-up, every `every` optimizer steps, and opens those whose importance comes back.

    A head is a candidate where it is near-uniform (uniformity of at least `near_uniform`) or idle (gradient norm of at
    most `idle` times the median head's), or where the L1 penalty has shrunk its gate to `small`. Candidates are closed
    from the least important one on, one at a time, each only while the probe loss stays within `budget` of the best it
    was during this look: two heads that stand in for each other are not both taken. Never more than `max_share` of all
    heads are closed. A closed head whose importance exceeds `regrow` times the loss gets its gate back at 1.

    The L1 penalty `l1 * sum |gate|` is taken as its proximal step behind the optimizer's (soft thresholding by
    rate * l1; Beck and Teboulle 2009): Adam would rescale its gradient. `probe` is a list of batches; `history` keeps
    one record per look, and `prune` removes the closed heads when training ends.

    Raises ValueError for settings out of range, TypeError at the start of training for a model without gates.
    """

    probe: Sequence[Batch]
    warmup_steps: int = 100
    every: int = 50
    max_share: float = 0.5
    near_uniform: float = 0.95
    idle: float = 0.1
    small: float = 0.05
    budget: float = 0.005
    regrow: float = 0.01
    l1: float = 0.0
    prune: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    _held: list[tuple[int, int]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.probe:
            raise ValueError("the probe is empty: give at least one batch to measure heads on")
        if self.every < 1 or self.warmup_steps < 0:
            raise ValueError(f"every={self.every} must be at least 1, warmup_steps={self.warmup_steps} at least 0")
        for name in ("max_share", "near_uniform"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share, from 0 to 1")
        for name in ("idle", "small", "budget", "regrow", "l1"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    # -- transformers.Trainer --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._held = gated(kwargs["model"]).closed_heads()  # of a run that is resumed

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A closed gate gets no gradient, so that the optimizer's averages hold none of it either."""
        model = gated(kwargs["model"])
        if model.gates.grad is not None:
            model.gates.grad.masked_fill_(model.gates == 0, 0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = gated(kwargs["model"]), kwargs["optimizer"]
        rate = next(
            (
                group["lr"]
                for group in getattr(optimizer, "optimizer", optimizer).param_groups
                if any(parameter is model.gates for parameter in group["params"])
            ),
            0.0,
        )
        self.shrink(model, rate)
        self._hold(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = state.global_step - self.warmup_steps
        if after >= 0 and after % self.every == 0:
            self.look(gated(kwargs["model"]), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.prune:
            gated(kwargs["model"]).prune_heads()

    # -- the parts -------------------------------------------------------------------------------------------------

    def shrink(self, model: AdaptiveForCausalLM, rate: float) -> None:
        """The penalty's proximal step: every gate `rate * l1` nearer to 0, and never past it."""
        if self.l1:
            gates = model.gates.data
            gates.copy_(gates.sign() * (gates.abs() - rate * self.l1).clamp(min=0))

    def _hold(self, model: AdaptiveForCausalLM) -> None:
        """Put back what the optimizer's momentum has moved: a closed gate stays at 0."""
        for layer, head in self._held:
            model.gates.data[layer, head] = 0

    def look(self, model: AdaptiveForCausalLM, step: int) -> dict[str, Any]:
        """Measure, open, close, and append one record to `history`."""
        figures = measure_heads(model, self.probe)
        present = list(_present(model))
        gates = model.gates.data
        opened = [
            (layer, head)
            for layer, head in present
            if gates[layer, head] == 0 and figures.importance[layer, head] > self.regrow * figures.loss
        ]
        for place in opened:
            gates[place] = 1
        total = model.config.n_layer * model.config.n_head
        gone = total - len(present)
        room = math.floor(self.max_share * total) - gone - len(model.closed_heads())
        candidates = [
            place for place in self._candidates(model, figures, present) if place not in opened
        ]  # just opened ones stay
        closed: list[tuple[int, int]] = []
        with _evaluating(model):
            best = _loss(model, self.probe)
            for place in candidates:
                if len(closed) >= room:
                    break
                before = gates[place].clone()
                gates[place] = 0
                loss = _loss(model, self.probe)
                if loss <= best * (1 + self.budget):
                    closed.append(place)
                    best = min(best, loss)  # a head that did harm must not pay for one that helps
                else:
                    gates[place] = before
            after = _loss(model, self.probe)
        self._held = model.closed_heads()
        record = {
            "step": step, "loss_before": figures.loss, "loss": after, "newly_closed": closed, "opened": opened,
            "closed": self._held, "removed": gone,
        }  # fmt: skip
        self.history.append(record)
        return record

    def _candidates(
        self, model: AdaptiveForCausalLM, figures: HeadFigures, present: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Open heads that are near-uniform, idle or nearly shut, least important first."""
        gates = model.gates.detach().abs().cpu()
        live = [place for place in present if gates[place] != 0]
        if not live:
            return []
        median = torch.stack([figures.gradient_norm[place] for place in live]).median()
        chosen = [
            place
            for place in live
            if figures.uniformity[place] >= self.near_uniform
            or figures.gradient_norm[place] <= self.idle * median
            or gates[place] <= self.small
        ]
        return sorted(chosen, key=lambda place: float(figures.importance[place]))


def gated(model: nn.Module) -> AdaptiveForCausalLM:
    """The adaptive model itself, out of whatever wraps it (DDP, PEFT, compile). Raises TypeError where it is none."""
    for part in model.modules():
        if isinstance(part, AdaptiveForCausalLM):
            return part
    raise TypeError(f"{type(model).__name__} holds no AdaptiveForCausalLM, so there are no gates to control")


def _present(model: AdaptiveForCausalLM) -> Iterator[tuple[int, int]]:
    return ((layer, head) for layer in range(model.config.n_layer) for head in model.config.heads_of(layer))


def _on(batch: Batch, model: AdaptiveForCausalLM) -> dict[str, Tensor]:
    return {name: value.to(model.gates.device) for name, value in batch.items()}


@torch.no_grad()
def _loss(model: AdaptiveForCausalLM, batches: Sequence[Batch]) -> float:
    """Cross-entropy per counted token over all batches."""
    total, counted = 0.0, 0
    for batch in batches:
        inputs = _on(batch, model)
        number = int((inputs["labels"][:, 1:] != -100).sum())
        total += float(model(**inputs, use_cache=False).loss) * number
        counted += number
    return total / max(1, counted)


@torch.no_grad()
def _entropies(model: AdaptiveForCausalLM, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    shape = tuple(model.gates.shape)
    entropy, uniform, queries = torch.zeros(shape, dtype=torch.float64), 0.0, 0
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused functions do not give the weights
    try:
        for batch in batches:
            inputs = _on(batch, model)
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).double()
            attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
            for layer, weights in enumerate(attentions):  # [B, h, T, T]
                weights = weights.double()
                each = -(weights * weights.clamp(min=1e-300).log()).sum(-1) * mask[:, None]  # real queries only
                heads = model.config.heads_of(layer)
                entropy[layer, heads] += each.sum((0, 2)).cpu()
            visible = mask.cumsum(-1).clamp(min=1)
            uniform += float((visible.log() * mask).sum())
            queries += int(mask.sum())
    finally:
        model.set_attn_implementation(implementation)
    return entropy / max(1, queries), entropy / max(uniform, 1e-12)


def _gradient_norms(model: AdaptiveForCausalLM, batches: Sequence[Batch]) -> Tensor:
    """[L, H]. Taken with autograd.grad: no `.grad` is touched."""
    attentions = [cast("AdaptiveAttention", block.attn) for block in model.transformer.h]
    weights = [part.weight for attn in attentions for part in (attn.c_attn, attn.c_proj)]
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        total = [torch.zeros_like(weight) for weight in weights]
        for batch in batches:
            with torch.enable_grad():
                loss = model(**_on(batch, model), use_cache=False).loss
                found = torch.autograd.grad(loss, weights)
            total = [sum_ + gradient for sum_, gradient in zip(total, found)]
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    norms = torch.zeros(tuple(model.gates.shape), dtype=torch.float64)
    for layer, attn in enumerate(attentions):
        heads, size = model.config.heads_of(layer), attn.head_dim
        fused, proj = total[2 * layer].double() / len(batches), total[2 * layer + 1].double() / len(batches)
        square = fused.view(fused.shape[0], 3, len(heads), size).square().sum((0, 1, 3))
        square = square + proj.view(len(heads), size, -1).square().sum((1, 2))
        norms[layer, heads] = square.sqrt().cpu()
    return norms


@contextmanager
def _gate(model: AdaptiveForCausalLM, layer: int, head: int, value: float) -> Iterator[None]:
    before = model.gates.data[layer, head].clone()
    model.gates.data[layer, head] = value
    try:
        yield
    finally:
        model.gates.data[layer, head] = before


@contextmanager
def _evaluating(model: AdaptiveForCausalLM) -> Iterator[None]:
    """Without dropout, and back to the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
