"""Parameters that logits are right not to use: of other modalities, for an encoder's states, for the loss alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmconform import structure
from lmconform.conventions import parameters_of
from lmconform.measuring.buffers import buffers_kept

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn", "cross_attention")
FEW = 64  # quantiles of a value, classes of a text
OTHER_MODALITIES = ("vision", "visual", "image", "img", "audio", "speech", "video")


def declared_unused(
    subject: Specimen, names: Iterable[str], ids: Tensor, base: Tensor, bound: float
) -> dict[str, list[str]]:
    """Of the parameters `names` those that only inputs not given here would use, by reason. Empty where none are.

    What declares it is the config (a part for another modality) or forward() (encoder_hidden_states, encoder_outputs),
    beside the name.
    The name alone excuses nothing: all of them are moved at once, and the logits of `ids` must stay at `base`.
    """
    import torch

    text, config = parameters_fed_by_text(subject), subject.config
    towers = any(getattr(config, f"{modality}_config", None) is not None for modality in OTHER_MODALITIES)
    reads_encoder = not {"encoder_hidden_states", "encoder_outputs"}.isdisjoint(parameters_of(subject.module)[0])
    tower: list[str] = []
    reader: list[str] = []
    for name in names:
        words = name.split(".")
        named = towers and any(modality in word for word in words for modality in OTHER_MODALITIES)
        if named or (text is not None and name not in text):
            tower.append(name)
        elif reads_encoder and any(word.startswith(CROSS_ATTENTION) for word in words):
            reader.append(name)
    if not tower and not reader:
        return {}
    moved = subject.copy()
    with torch.no_grad():
        parameters = dict(moved.module.named_parameters())
        for name in (*tower, *reader):
            parameters[name].add_(1.0)
    if not float((moved.logits(ids).double() - base.double()).abs().max()) <= bound:
        return {}
    return {"of another modality": tower, "cross-attention where no states of an encoder are given": reader}


def reached_by_loss(subject: Specimen, ids: Tensor) -> frozenset[str]:
    """Names of the parameters to which the model's own loss of `ids`, in train mode, gives a gradient other than 0.

    A head for further tokens, or a router that only a balancing loss teaches, is used in training alone. Empty where no
    labels are taken, or the loss raises: that is for the family loss to say.
    """
    import torch

    if not subject.can("labels"):
        return frozenset()
    parameters = {name: p for name, p in subject.module.named_parameters() if p.requires_grad}
    torch.manual_seed(subject.seed)
    with buffers_kept(subject.module):
        try:
            loss = subject.forward(ids, labels=ids, use_cache=False, train=True, grad=True).loss
        except Exception:
            return frozenset()
        if loss is None or not loss.requires_grad:
            return frozenset()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return frozenset(
        name for name, grad in zip(parameters, grads, strict=True) if grad is not None and bool(grad.any())
    )


def _few(value: Tensor, ids: Tensor, width: int) -> bool:
    """Whether it holds a few numbers for each token [batch, time, few] or for each text [batch, few]."""
    for leading in (ids.shape, ids.shape[:1]):
        rest = value.shape[len(leading) :]
        if value.shape[: len(leading)] == leading and len(rest) < 2 and (not rest or rest[0] < min(width, FEW)):
            return True
    return False


def reached_by_other_outputs(subject: Specimen, ids: Tensor) -> frozenset[str]:
    """Names of the parameters that reach what forward() gives beside the logits, a few numbers a token or a text.

    That is what a value head or a classifier gives. Hidden states, as wide as the model, and caches are no outputs of
    their own: a dead branch of the language model may reach these.
    """
    import torch

    parameters = {name: p for name, p in subject.module.named_parameters() if p.requires_grad}
    with buffers_kept(subject.module):
        given = subject.forward(ids, use_cache=False, train=True, grad=True).beside
        table = structure.embedding(subject.module, subject.vocab_size)
        width = int(getattr(table, "embedding_dim", FEW + 1))
        others = [value.double().sum() for value in given if value.requires_grad and _few(value, ids, width)]
        if not others:
            return frozenset()
        grads = torch.autograd.grad(torch.stack(others).sum(), list(parameters.values()), allow_unused=True)
    return frozenset(
        name for name, grad in zip(parameters, grads, strict=True) if grad is not None and bool(grad.any())
    )


def parameters_fed_by_text(subject: Specimen) -> set[str] | None:
    """Names of the language model's parameters in a model of several modalities; None for a plain language model."""
    whole, text = getattr(subject.module, "config", None), subject.config
    if whole is None or text is None or whole is text:
        return None
    modules = dict(subject.module.named_modules())
    parts = [name for name, part in modules.items() if getattr(part, "config", None) is text]
    return {name for name, _ in subject.module.named_parameters() if any(name.startswith(f"{part}.") for part in parts)}
