"""The quantum model once more, in complex numbers and for reading: the definition that modeling.py is held against."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from models.layers import FeedForward, SelfAttention
from models.quantum.modeling import FeedForwardAndInterference, Interference, QuantumBlock, QuantumForCausalLM

# what is written out below; every other field of the config is followed
DEFINED = {
    "norm": "rms", "norm_placement": "pre", "gated": False, "use_parallel_residual": False, "embedding_norm": False,
    "is_causal": True, "rope_type": "default",
}  # fmt: skip


def complex_forward(model: QuantumForCausalLM, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [batch, time, vocab] in float64, and the states z after the embedding and each block, complex128.

    input_ids [batch, time], without padding. For configs that agree with DEFINED, the default; nothing is fused, cached
    or left to an attention function. Raises ValueError for others.
    """
    config = model.config
    rotary = config.rope_parameters or {}
    fields = {"is_causal": True, **config.to_dict(), "rope_type": rotary.get("rope_type", "default")}
    if wrong := [f"{name}={fields[name]!r}" for name, value in DEFINED.items() if fields[name] != value]:
        raise ValueError(f"the reference is written for pre-norm RMSNorm blocks, and does not know {', '.join(wrong)}")
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        amplitude, phase = model.model.embedding(input_ids).chunk(2, dim=-1)
        size = (amplitude.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        z = torch.polar(torch.ones_like(phase), phase) * (amplitude / size)
        states = [z]
        for block in model.model.blocks:
            assert isinstance(block, QuantumBlock)
            z = z + attention(cast(SelfAttention, block.attention), norm(block.attention_norm, z))
            inner, branch = norm(block.feed_forward_norm, z), block.feed_forward
            if isinstance(branch, FeedForwardAndInterference):
                z = z + feed_forward(branch.feed_forward, inner) + interference(branch.interference, inner)
            else:
                z = z + feed_forward(branch, inner)
            states.append(z)
        z = norm(model.model.final_norm, z)
        return model.head(parts(z)), states


def parts(z: Tensor) -> Tensor:
    """[..., n] complex -> [..., 2n]: real parts, then imaginary ones."""
    return torch.cat([z.real, z.imag], dim=-1)


def whole(x: Tensor) -> Tensor:
    """[..., 2n] -> [..., n] complex."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def widely_linear(weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """W z + V conj(z) + b for the matrix [[A, B], [C, D]]: W = (A + D + i(C - B)) / 2, V = (A - D + i(C + B)) / 2."""
    (a, b), (c, d) = (rows.chunk(2, dim=1) for rows in weight.chunk(2, dim=0))
    straight, mirrored = torch.complex(a + d, c - b) / 2, torch.complex(a - d, c + b) / 2
    made = z @ straight.T + z.conj() @ mirrored.T
    return made if bias is None else made + whole(bias)


def norm(module: nn.Module, z: Tensor) -> Tensor:
    """z over the root of the mean of |z|^2 / 2 (each number counts as two), real and imaginary gains apart."""
    assert isinstance(module, nn.RMSNorm)
    assert module.eps is not None
    size = (z.abs().square().mean(-1, keepdim=True) / 2 + module.eps).sqrt()
    real, imaginary = module.weight.chunk(2)
    return torch.complex(z.real / size * real, z.imag / size * imaginary)


def attention(module: SelfAttention, z: Tensor) -> Tensor:
    """softmax(Re(q conj(k)) / sqrt(d)) v, causal; q and k carry their position as a phase. z [batch, time, n]."""
    time, groups = z.shape[1], module.num_key_value_groups
    rows, biases = module.qkv.weight.split(module.head_dim), [None] * module.qkv.out_features
    if module.qkv.bias is not None:
        biases = module.qkv.bias.split(module.head_dim)
    heads = [widely_linear(weight, bias, z) for weight, bias in zip(rows, biases)]
    q = heads[: module.heads]
    k, v = heads[module.heads : module.heads + module.kv_heads], heads[module.heads + module.kv_heads :]
    half = module.head_dim // 2
    base = module.config.rope_parameters["rope_theta"]
    rates = 1.0 / base ** (torch.arange(0, half, dtype=torch.float32) / half)
    angles = torch.arange(time)[:, None] * rates  # in float32, as rotary tables are whatever the model's type
    turned = torch.complex(angles.cos(), angles.sin())
    seen = torch.ones(time, time, dtype=torch.bool).tril()
    mixed = []
    for index, query in enumerate(q):
        key, value = k[index // groups], v[index // groups]
        scores = ((query * turned) @ (key * turned).conj().transpose(1, 2)).real * module.scaling
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed.append(parts(weights.to(value.dtype) @ value))
    return whole(module.out(torch.cat(mixed, dim=-1)))


def feed_forward(module: nn.Module, z: Tensor) -> Tensor:
    """W2 act(W1 z), the activation on real and imaginary parts apart."""
    assert isinstance(module, FeedForward)
    inner = widely_linear(module.up.weight, module.up.bias, z)
    inner = torch.complex(module.activation(inner.real), module.activation(inner.imag))
    return widely_linear(module.down.weight, module.down.bias, inner)


def interference(module: Interference, s: Tensor) -> Tensor:
    """W_o (c u), u = (s + r) / sqrt(2), c = 2 Re(s conj r) / (|s|^2 + |r|^2), r = W s + b."""
    r = widely_linear(module.reference.weight, module.reference.bias, s)
    contrast = 2 * (s * r.conj()).real / (s.abs().square() + r.abs().square() + module.eps)
    return widely_linear(module.out.weight, module.out.bias, contrast * (s + r) / 2**0.5)
