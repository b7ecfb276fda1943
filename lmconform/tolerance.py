"""How much two computations of the same thing may differ: measured, not guessed.

The noise floor of a subject is what rounding alone does to its logits: the distance to a float64 copy, and the change
under weights moved by one unit in the last place. A comparison is allowed `FACTOR` noise floors. The floor is the
90th percentile over tokens, so that a token whose expert routing flips does not widen the bound for all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.specimen import Specimen

FACTOR = 16.0
CONFIRM_BELOW = 1000.0  # a red within this many bounds must be confirmed in float64, where there is such a copy
TWIN_APART = 1000.0  # perturbations by which a float64 copy may differ and still be the same model
TWIN_PERTURBATION = 1e-10  # far above float64 rounding, far below float32's: hidden float32 parts show as noise


def epsilon(dtype: torch.dtype) -> float:
    """The distance from 1.0 to the next number of that type."""
    import torch

    return torch.finfo(dtype).eps


def is_half(dtype: torch.dtype) -> bool:
    """Whether it is one of the half types, whose rounding is as large as many an effect that is looked for."""
    return epsilon(dtype) > 1e-4


def noise_floor(subject: Specimen) -> float:
    """What rounding does to the logits of `subject.noise_ids`, in logits (absolute)."""
    floors = [subject.perturbation]
    twin = subject.twin()
    if twin is not None:
        apart = subject.logits(subject.noise_ids).double() - twin.logits(subject.noise_ids).double()
        floors.append(typical(apart))
    finite = [floor for floor in floors if floor == floor]
    return max(finite, default=float("nan"))


def perturbation(subject: Specimen, ids: Tensor) -> float:
    """What the smallest change of the weights does to the logits of `ids` [batch, time], in logits (absolute)."""
    import torch

    base = subject.logits(ids).double()
    size = TWIN_PERTURBATION if subject.dtype == torch.float64 else epsilon(subject.dtype)
    moved = typical(base - perturbed(subject, ids, size).double())
    return max(typical(epsilon(subject.dtype) * base.abs()), moved if moved == moved else 0.0)


def perturbed(subject: Specimen, ids: Tensor, size: float) -> Tensor:
    """Logits of a copy whose weights are moved at random by a relative `size`, at least to the next number."""
    import torch

    def moved(weight: Tensor, generator: torch.Generator) -> Tensor:
        if not weight.is_floating_point():
            return weight
        wobble = torch.randn(weight.shape, generator=generator).to(weight)
        if size > epsilon(weight.dtype):
            return weight * (1 + size * wobble)
        # one unit in the last place, for every other weight: a smaller product would round to no change
        return torch.where(wobble > 0, weight * (1 + epsilon(weight.dtype)), weight)

    if subject.is_large:
        salted = {name: subject.seed + 1 + salt for salt, (name, _) in enumerate(subject.module.named_parameters())}
        return subject.changed(lambda name, weight: moved(weight, torch.Generator().manual_seed(salted[name]))).logits(
            ids
        )
    copy = subject.copy()
    generator = torch.Generator().manual_seed(subject.seed + 1)
    with torch.no_grad():
        for parameter in copy.module.parameters():
            parameter.copy_(moved(parameter, generator))
    return copy.logits(ids)


def other_rounding(subject: Specimen) -> Specimen:
    """The same model under other rounding: its float64 copy, else a copy with weights moved by one unit."""
    import torch

    twin = subject.twin()
    if twin is not None:
        return twin
    copied = subject.copy()
    size = max(epsilon(subject.dtype), TWIN_PERTURBATION)
    with torch.no_grad():
        for parameter in copied.module.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + size)
    return copied


def typical(error: Tensor) -> float:
    """The 90th percentile over tokens of the largest error of a token: [..., token, width] to one number."""
    per_token = error.abs().amax(dim=-1).flatten()
    per_token = per_token[per_token.isfinite()]
    return float(per_token.quantile(0.9)) if per_token.numel() else float("nan")


def allowed(noise: float, logits: Tensor) -> float:
    """The bound for comparing logits like these: FACTOR noise floors, at least FACTOR units in the last place."""
    scale = float(logits.detach().nan_to_num(0.0, 0.0, 0.0).abs_().max()) if logits.numel() else 0.0
    floor = epsilon(logits.dtype) * scale
    return FACTOR * max(noise if noise == noise else 0.0, floor)
