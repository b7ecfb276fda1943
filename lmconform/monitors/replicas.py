"""ReplicaMonitor: under distributed training every process must hold the same weights."""

from __future__ import annotations

from typing import Any

from lmconform.monitors.base import Moment, Monitor


class ReplicaMonitor(Monitor):
    """A fingerprint of every parameter and buffer, compared over the processes. Sharded tensors (FSDP) are left out.

    All processes must call it at the same steps: it gathers a few numbers per tensor. Alone it sees nothing.
    """

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        import torch
        import torch.distributed as dist

        if moment.model is None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
            return None
        tensors = {
            name: tensor.detach()
            for name, tensor in [*moment.model.named_parameters(), *moment.model.named_buffers()]
            if type(tensor.detach()).__name__ != "DTensor" and tensor.numel()
        }
        if not tensors:
            return None
        prints = fingerprints(list(tensors.values()))
        all_prints = [torch.empty_like(prints) for _ in range(dist.get_world_size())]
        dist.all_gather(all_prints, prints)
        apart = (torch.stack(all_prints) != prints).any(0)
        differing = [name for name, differs in zip(tensors, apart.tolist(), strict=True) if differs]
        if differing:
            self.warn(
                moment, "distributed.replicas_diverge",
                f"{differing[0]} differs between the processes ({len(differing)} of {len(tensors)} tensors do)",
                "It is not broadcast at the start or its gradient is not reduced: look for parameters made after the "
                "DDP wrapper, _ddp_params_and_buffers_to_ignore, weights changed by hand, or statistics that each "
                "process keeps for itself.", tensors=differing[:20],
            )  # fmt: skip
        return {"tensors": len(tensors), "differing": differing[:20]}


def fingerprints(tensors: list[Any]) -> Any:
    """One whole number a tensor: the sum of its bits, exact whatever the order. [n] of int64."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        bits = tensor.contiguous().view(torch.uint8 if tensor.dtype == torch.bool else whole[tensor.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums)
