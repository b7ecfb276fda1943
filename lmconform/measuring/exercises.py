"""A model exercised on a device: forward, padded, with a cache, backward, generate; what came out and what was raised.

Nothing is registered here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmconform.measuring.generating import Generator
from lmconform.measuring.running import followed
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

TIME = 12
KERNELS = ("/triton/", "/torch/_ops.py", "/flash_attn/", "/mamba_ssm/", "/causal_conv1d/", "/kernels/")


@dataclass
class Run:
    """One exercise: `values` are logits [batch, time, vocab] on the CPU where it gave any."""

    values: Tensor | None = None
    error: Exception | None = None
    place: str = ""  # the submodule that raised
    devices: tuple[str, ...] = ()  # where its outputs came back

    @property
    def beyond_pretence(self) -> bool:
        """Whether it fails because kernels of the real device are not there."""
        if self.error is None:
            return False
        if isinstance(self.error, NotImplementedError | ImportError):
            return True
        frames = traceback.extract_tb(self.error.__traceback__)
        return any(part in frame.filename for frame in frames for part in KERNELS)


@dataclass
class Course:
    """All exercises on one device; `strays` are parameters and buffers that were elsewhere at the end."""

    device: str
    runs: dict[str, Run] = field(default_factory=dict)
    strays: dict[str, str] = field(default_factory=dict)
    pretended: bool = False


Exercise = Callable[["Specimen", "Tensor"], "Tensor | None"]


def forward(subject: Specimen, ids: Tensor) -> Tensor:
    return subject.logits(ids)


def padded(subject: Specimen, ids: Tensor) -> Tensor:
    """Row 0 is left-padded by three; its real tokens, then row 1, as one row [1, 2 * time - 3, vocab]."""
    import torch

    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = subject.logits(ids, mask=mask)
    return torch.cat([logits[0, 3:], logits[1]])[None]


def cached(subject: Specimen, ids: Tensor) -> Tensor:
    split = ids.shape[1] - 2
    past = subject.forward(ids[:, :split], use_cache=True)
    return subject.forward(ids[:, split : split + 1], cache=past.cache, use_cache=True).logits


def backward(subject: Specimen, ids: Tensor) -> None:
    """Train mode, with the model's own loss where it has one."""
    if subject.can("labels"):
        output = subject.forward(ids, labels=ids, use_cache=False, train=True, grad=True)
        (output.logits.float().mean() if output.loss is None else output.loss).backward()
    else:
        subject.logits(ids, train=True, grad=True).float().square().mean().backward()
    for name, parameter in subject.module.named_parameters():
        if parameter.grad is not None and parameter.grad.device != parameter.device:
            raise RuntimeError(f"the gradient of {name} is on {parameter.grad.device}, not on {parameter.device}")


def generate(subject: Specimen, ids: Tensor) -> None:
    """Two tokens. A generate() that wants what is not known here is left out."""
    try:
        Generator(subject).greedy(ids[:, :4], 2)
    except Unavailable:
        return


def exercises(subject: Specimen) -> dict[str, Exercise]:
    """What this subject can be asked to do."""
    found: dict[str, Exercise] = {"forward": forward}
    if subject.can("mask"):
        found["padded forward"] = padded
    if subject.can("cache"):
        found["cached step"] = cached
    found["backward"] = backward
    if subject.can("gen"):
        found["generate()"] = generate
    return found


def probe(subject: Specimen, ctx: Context) -> Tensor:
    """The tokens of all exercises, on the CPU."""
    return ctx.ids(2, subject.longest(TIME)).cpu()


def sound_here(subject: Specimen, ctx: Context) -> Course:
    """The exercises on the CPU. What fails there is another check's finding, and is not asked of a device."""
    import torch

    copied = subject.copy()
    copied.module.to("cpu")
    return exercised(copied, torch.device("cpu"), probe(subject, ctx), exercises(subject))


def exercised(subject: Specimen, device: torch.device, ids: Tensor, tasks: dict[str, Exercise]) -> Course:
    """`subject`, which is a copy and lies on `device`, put through these tasks with `ids`, moved there."""
    course = Course(str(device))
    ids = ids.to(device)
    with followed(subject.module) as running:
        for name, task in tasks.items():
            run = course.runs[name] = Run()
            try:
                made = task(subject, ids)
            except Exception as error:
                run.error, run.place = error, running.place
                running.names.clear()
                running.kinds.clear()
                continue
            if made is not None:
                run.devices = (str(made.device),)
                run.values = made.detach().cpu()
    tensors: list[tuple[str, Any]] = [*subject.module.named_parameters(), *subject.module.named_buffers()]
    course.strays = {name: str(tensor.device) for name, tensor in tensors if tensor.device != device}
    return course
