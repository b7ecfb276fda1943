"""LoRA adapters by peft on a subject: which layers take one, wrapping, and setting the adapters' weights."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.conventions import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lmconform.specimen import Specimen

RANK = 4
ADAPTERS = "its adapters alone are trained, and how much they can learn is the base's: check the base model"


def wraps_adapters(module: nn.Module) -> bool:
    """Whether it is peft's model around another: it saves its adapters alone, and trains little else."""
    return type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "load_adapter")


def saves_adapters(module: nn.Module) -> bool:
    """Whether peft can save what it has put around that module: a PeftMixedModel it cannot."""
    return wraps_adapters(module) and type(module).__name__ != "PeftMixedModel"


def reason_against(subject: Specimen) -> str:
    """Why no LoRA adapter can be put on it; empty where one can."""
    if find_spec("peft") is None:
        return "peft is not installed"
    if not targets(subject):
        return "no linear layers (nn.Linear or Conv1D) in repeated blocks were found"
    return ""


def targets(subject: Specimen) -> list[str]:
    """Names of the linear layers inside the repeated blocks; the head and embeddings are left alone."""
    from torch import nn

    found = structure.blocks(subject.module)
    if found is None:
        return []
    prefix = found[0] + "."
    return [
        name
        for name, part in subject.module.named_modules()
        if name.startswith(prefix) and (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D")
    ]


def adapted(subject: Specimen, names: list[str]) -> tuple[Specimen, list[str], dict[str, str]]:
    """A copy with a fresh LoRA adapter on those layers; those that took it; peft's refusals by last part of name."""
    refused: dict[str, str] = {}
    while True:
        left = [name for name in names if name.rpartition(".")[2] not in refused]
        copied = subject.copy()
        try:
            return copied._derive(wrap(copied.module, left)), left, refused
        except ValueError as error:  # peft names the layer that it takes on no such model (Mamba's out_proj)
            named = next((n for n in left if f"'{n}'" in str(error)), None)
            named = named or next((n for n in left if f"'{n.rpartition('.')[2]}'" in str(error)), None)
            if named is None:
                raise
            refused[named.rpartition(".")[2]] = first_line(error)


def wrap(module: nn.Module, names: list[str]) -> nn.Module:
    """peft's model around that module, in eval mode."""
    from peft import LoraConfig, get_peft_model

    kind = {type(module.get_submodule(name)).__name__ for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, fan_in_fan_out=kind == {"Conv1D"})
        return get_peft_model(module, config).eval()


def layers(module: nn.Module) -> dict[str, Any]:
    """The adapted layers by their name in the base model."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {n.removeprefix(prefix): part for n, part in module.named_modules() if isinstance(part, LoraLayer)}


def perturb(module: nn.Module, generator: torch.Generator) -> None:
    """Give every adapter a second matrix, as if trained: the change is a quarter of the layer's own size."""
    import torch

    with torch.no_grad():
        for layer in layers(module).values():
            for name, first in layer.lora_A.items():
                second = layer.lora_B[name].weight
                drawn = torch.randn(second.shape, generator=generator).to(second)
                change = (drawn @ first.weight).square().mean().sqrt() * layer.scaling[name]
                own = layer.get_base_layer().weight.float().square().mean().sqrt()
                second.copy_(drawn * (0.25 * own / change.clamp(min=1e-12)))
