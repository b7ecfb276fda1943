"""How stacked copies of one model are run as one, and why some models cannot be."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.conventions import first_line
from lmconform.sweep.batches import Batch, Loss, given_labels, logits_of
from lmconform.sweep.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

WAYS = ("as it is called", "with eager attention", "with eager attention and a ready 4-D mask")


@dataclass
class Vectorised:
    """How all members are run at once: stacked weights and ids to losses [members] and gradients."""

    specimen: Specimen
    loss: Loss
    labels: bool
    mask: bool
    outside: bool = True  # autograd around vmap, half the work; inside it where operations fall back to a loop
    layout: Layout | None = None

    def one(self, weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        """The loss of one member: what is vmapped."""
        return self.loss(self.logits(weights, ids, targets), targets)

    def logits(self, weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        from torch.func import functional_call

        convention, module = self.specimen.convention, self.specimen.module

        def call(*arguments: Any, **keywords: Any) -> Any:
            return functional_call(module, weights, arguments, keywords)

        inputs: dict[str, Any] = {"use_cache": False}
        if self.labels:
            inputs["labels"] = given_labels(self.specimen, Batch(ids, targets))
        if self.mask:
            inputs["mask"] = ready_mask(ids.shape[1], self.specimen)
        return convention.run(call, ids, **inputs).logits  # type: ignore[arg-type]

    def losses_and_gradients(
        self, weights: dict[str, Tensor], ids: Tensor, targets: Tensor, shared: bool
    ) -> tuple[Tensor, list[Tensor]]:
        import torch
        from torch.func import grad_and_value, vmap

        dims = (0, None, None) if shared else (0, 0, 0)
        if not self.outside:
            mapped = vmap(grad_and_value(self.one), in_dims=dims, randomness="different")
            gradients, losses = mapped(weights, ids, targets)
            return losses, list(gradients.values())
        leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
        losses = vmap(self.one, in_dims=dims, randomness="different")(leaves, ids, targets)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        zipped = zip(found, leaves.values(), strict=True)
        return losses.detach(), [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zipped]


def ready_mask(time: int, specimen: Specimen) -> Tensor:
    """What is added to the scores: 0 where a query may look, the lowest number elsewhere: [1, 1, time, time]."""
    import torch

    lowest = torch.finfo(specimen.dtype).min
    seen = torch.full((time, time), lowest, dtype=specimen.dtype, device=specimen.device).triu(1)
    return seen[None, None]


def vectorisable(
    subject: Specimen, start: Specimen, example: Batch, loss: Loss, labels: bool
) -> tuple[Vectorised | None, str]:
    """How to run stacked copies of it, or None and why not.

    A way counts only if it gives the logits that the model gives when called alone, both with fresh and with the
    subject's own weights: a ready mask would otherwise hide what the model does without one.
    """
    import torch
    from torch import nn
    from torch.func import vmap

    from lmconform.measuring.dropout import without_dropout

    if list(dict(start.module.named_parameters())) != list(dict(nn.Module.named_parameters(start.module))):
        return None, "its named_parameters() gives names of its own, under which functional_call reaches no module"
    weights = [
        {name: weight.detach() for name, weight in specimen.module.named_parameters() if weight.requires_grad}
        for specimen in (start, without_dropout(subject))
    ]
    if not weights[0]:
        return None, "no parameter requires a gradient"
    if any(not weight.is_floating_point() for weight in weights[0].values()):
        return None, "a trainable parameter is not floating"
    if differing := _differing_state(start, subject):
        return None, f"{differing} is no trained parameter and differs from copy to copy"
    stacked = {name: torch.stack([weight[name] for weight in weights]) for name in weights[0]}
    with torch.no_grad():
        alone = torch.stack([logits_of(_with(start, weight), example, labels).detach() for weight in weights])
    reason = ""
    for way in WAYS:
        try:
            specimen = _prepared(start, way)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            reason = reason or first_line(error)
            continue
        if specimen is None:
            continue
        run = Vectorised(specimen, loss, labels, mask=way == WAYS[2])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                specimen.module.train()
                together = vmap(run.logits, in_dims=(0, None, None), randomness="different")(
                    stacked, example.ids, example.targets
                )
                _, gradients = run.losses_and_gradients(dict(stacked), example.ids, example.targets, True)
            except Exception as error:
                reason = reason or f"{type(error).__name__} under vmap: {first_line(error)}"
                continue
        if any("batching rule" in str(warning.message) for warning in said):
            run.outside = False
        worst = float((together.detach().double() - alone.double()).abs().max())
        if not worst <= tolerance.allowed(subject.noise, alone):
            reason = reason or f"stacked copies give other logits than one alone (by {worst:.2g})"
            continue
        run.layout = Layout.of(specimen.module, gradients)
        return run, ""
    return None, reason or "it cannot be run under vmap"


def _prepared(start: Specimen, way: str) -> Specimen | None:
    """A copy to be run that way; None where it is not offered."""
    copy = start.copy()
    eager = getattr(copy.module, "set_attn_implementation", None)
    if way == WAYS[0]:
        return copy if eager is None else None
    if eager is None or (way == WAYS[2] and copy.convention.mask != "attention_mask"):
        return None
    eager("eager")
    return copy


def _with(start: Specimen, weights: dict[str, Tensor]) -> Specimen:
    import torch

    copy = start.copy()
    parameters = dict(copy.module.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return copy


def _differing_state(start: Specimen, subject: Specimen) -> str:
    """A buffer or frozen parameter that another seed's model has otherwise; empty where there is none."""
    import torch

    if subject.builder is None:
        return ""
    other = subject.fresh(start.seed + 1).module

    def state(module: nn.Module) -> dict[str, Tensor]:
        frozen = {name: weight for name, weight in module.named_parameters() if not weight.requires_grad}
        return {**frozen, **dict(module.named_buffers())}

    mine, theirs = state(start.module), state(other)
    return next((name for name in mine if name in theirs and not torch.equal(mine[name], theirs[name])), "")
