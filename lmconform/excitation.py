"""Random weights under which no fault hides.

Fresh weights hide faults: norms are 1, biases 0, and matrices so small that attention is nearly uniform and logits
nearly equal. Excitation keeps the structure of every parameter and moves it to a scale where each part is felt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

MATRIX_GAIN = 1.2  # RMS of a matrix is gain / sqrt(fan_in): attention scores near N(0, 1.4), not near 0
EMBEDDING_RMS = 0.6
NORM_JITTER = 0.3
BIAS_RMS = 0.3


def excite(module: nn.Module, seed: int) -> None:
    """Move every parameter in place to a telling scale. Same seed, same result; tied weights stay tied."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    roles = roles_of(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0 or parameter.is_meta:
                continue
            role = roles.get(id(parameter), "other")
            values = parameter.detach().to("cpu", torch.float32)
            noise = torch.randn(values.shape, generator=generator)
            parameter.copy_(_excited(role, values, noise).to(parameter.dtype))


def _excited(role: str, values: Tensor, noise: Tensor) -> Tensor:
    rms = values.square().mean().sqrt().item()
    if role == "embedding":
        if rms == 0:
            return noise * EMBEDDING_RMS
        return values * (EMBEDDING_RMS / rms) if rms < EMBEDDING_RMS else values
    if role == "linear":
        target = MATRIX_GAIN / max(values.shape[-1], 1) ** 0.5
        return noise * target if rms == 0 else values * (target / rms)
    if role == "conv1d":  # transformers' Conv1D keeps [in, out]
        target = MATRIX_GAIN / max(values.shape[0], 1) ** 0.5
        return noise * target if rms == 0 else values * (target / rms)
    if role == "bias":
        return values + noise * BIAS_RMS
    if role == "norm":
        return values + noise.clamp(-2, 2) * NORM_JITTER
    if values.dim() >= 3 and 0 < rms < 0.05:  # stacked experts, as raw parameters: [experts, out, in] either way round
        return values * (1.0 / min(values.shape[-2:]) ** 0.5 / rms)
    if rms == 0:
        return noise * 0.1
    if values.dim() == 2 and _drawn_around_zero(values, rms):  # a matrix kept as a raw parameter: a router, a table
        return values * max(1.0, MATRIX_GAIN / max(values.shape) ** 0.5 / rms)  # which way round is not known
    # anything else may live in a special range (decay rates, log-scales): a jitter keeps it there
    return values * (1 + 0.1 * noise.clamp(-2, 2))


def _drawn_around_zero(values: Tensor, rms: float) -> bool:
    """Whether it looks like random weights, and not like rates or scales, which have one sign or few values."""
    return abs(values.mean().item()) < 0.3 * rms and values.unique().numel() > values.numel() // 2


def roles_of(module: nn.Module) -> dict[int, str]:
    """What each parameter is, by id: embedding, linear, conv1d, norm or bias; others are left out."""
    from torch import nn

    roles: dict[int, str] = {}
    for part in module.modules():
        weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
        if isinstance(part, nn.Embedding):
            roles.setdefault(id(weight), "embedding")
        elif isinstance(part, nn.Linear):
            roles.setdefault(id(weight), "linear")
        elif isinstance(part, nn.MultiheadAttention):
            for name, parameter in part.named_parameters(recurse=False):
                role = {"weight": "linear", "bias": "bias"}.get(name.rpartition("_")[2])  # in_proj_weight, in_proj_bias
                if role is not None:
                    roles.setdefault(id(parameter), role)
        elif type(part).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
            roles.setdefault(id(weight), "conv1d")
        elif weight is not None and weight.dim() == 1 and "norm" in type(part).__name__.lower():
            roles.setdefault(id(weight), "norm")
        if bias is not None and bias.dim() == 1 and (isinstance(part, nn.Linear) or id(weight) in roles):
            roles.setdefault(id(bias), "bias")
    return roles
