"""CUDA's placement rules, one operation at a time: what is legal stays legal, what is refused is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmconform.simulated import PlacementError, simulated_accelerator


def _operands() -> dict[str, Tensor]:
    return {
        "gpu": torch.ones(3, 3, device="cuda"),
        "cpu": torch.ones(3, 3),
        "one": torch.tensor(2.0),
        "gpu_one": torch.tensor(2.0, device="cuda"),
        "index": torch.tensor([0, 2]),
        "gpu_index": torch.tensor([0, 2], device="cuda"),
        "where": torch.eye(3).bool(),
    }


def _set(x: Tensor, key: object, value: object) -> Tensor:
    x[key] = value  # type: ignore[index]
    return x


LEGAL: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], str]] = {
    "cpu scalar right": (lambda o: o["gpu"] + o["one"], "cuda"),
    "cpu scalar left": (lambda o: o["one"] * o["gpu"], "cuda"),
    "cpu scalar with gpu scalar": (lambda o: o["one"] * o["gpu_one"], "cuda"),
    "cpu scalar in place": (lambda o: o["gpu"].mul_(o["one"]), "cuda"),
    "cpu scalar compared": (lambda o: o["gpu"] == o["one"], "cuda"),
    "cpu scalar in where": (lambda o: torch.where(o["gpu"] > 0, o["gpu"], o["one"]), "cuda"),
    "cpu scalar as fill": (lambda o: o["gpu"].masked_fill(o["gpu"] > 0, o["one"]), "cuda"),
    "cpu indices": (lambda o: o["gpu"][o["index"]], "cuda"),
    "cpu mask as index": (lambda o: o["gpu"][o["where"]], "cuda"),
    "cpu indices when set": (lambda o: _set(o["gpu"], o["index"], 0.0), "cuda"),
    "cpu scalar put": (lambda o: _set(o["gpu"], o["index"], o["one"]), "cuda"),
    "cpu tensor into slice": (lambda o: _set(o["gpu"], slice(0, 3), o["cpu"]), "cuda"),
    "copy to gpu": (lambda o: o["gpu"].copy_(o["cpu"]), "cuda"),
    "copy to cpu": (lambda o: o["cpu"].copy_(o["gpu"]), "cpu"),
    "new_zeros": (lambda o: o["gpu"].new_zeros(2), "cuda"),
    "new_tensor": (lambda o: o["gpu"].new_tensor([1.0]), "cuda"),
    "zeros_like": (lambda o: torch.zeros_like(o["gpu"]), "cuda"),
    "zeros_like elsewhere": (lambda o: torch.zeros_like(o["gpu"], device="cpu"), "cpu"),
    "like other": (lambda o: o["cpu"].to(o["gpu"]), "cuda"),
    "type_as": (lambda o: o["cpu"].type_as(o["gpu"]), "cuda"),
    "view": (lambda o: o["gpu"].view(-1)[2:].unsqueeze(0), "cuda"),
    "data": (lambda o: o["gpu"].data, "cuda"),
    "as_tensor": (lambda o: torch.as_tensor(o["gpu"]), "cuda"),
    "as_tensor elsewhere": (lambda o: torch.as_tensor(o["gpu"], device="cpu"), "cpu"),
    "tensor of tensor": (lambda o: o["gpu"].clone().detach(), "cuda"),
    "out": (lambda o: torch.add(o["gpu"], 1, out=torch.empty(3, 3, device="cuda")), "cuda"),
    "histc of integers": (lambda o: torch.histc(o["gpu_index"], bins=3, min=0, max=2), "cuda"),
    "half": (lambda o: o["gpu"].half(), "cuda"),
    "int device": (lambda o: o["cpu"].to(0), "cuda"),
    "cuda()": (lambda o: o["cpu"].cuda(0), "cuda"),
    "tensor_split": (lambda o: o["gpu"].tensor_split(torch.tensor([1]))[1], "cuda"),
    "sparse": (lambda o: o["gpu"].to_sparse().to_dense(), "cuda"),
    "einsum": (lambda o: torch.einsum("ij,kj->ik", o["gpu"], o["gpu"]), "cuda"),
    "one_hot": (lambda o: F.one_hot(o["gpu_index"], 4), "cuda"),
    "sdpa": (lambda o: F.scaled_dot_product_attention(o["gpu"][None], o["gpu"][None], o["gpu"][None]), "cuda"),
    "vmap": (lambda o: torch.vmap(lambda row: row * o["gpu"].sum(), in_dims=0)(o["gpu"]), "cuda"),
}

REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "add": (lambda o: o["gpu"] + o["cpu"], "found at least two devices, cuda:0 and cpu!"),
    "add reversed": (lambda o: o["cpu"] + o["gpu"], "found at least two devices, cuda:0 and cpu!"),
    "gpu scalar with cpu tensor": (lambda o: o["cpu"] * o["gpu_one"], "found at least two devices, cuda:0 and cpu!"),
    "in place on cpu scalar": (lambda o: o["one"].add_(o["gpu_one"]), "found at least two devices, cuda:0 and cpu!"),
    "out elsewhere": (lambda o: torch.add(o["gpu"], 1, out=o["cpu"]), "found at least two devices, cuda:0 and cpu!"),
    "where": (lambda o: torch.where(o["where"], o["gpu"], 0.0), "found at least two devices, cuda:0 and cpu!"),
    "masked_fill": (lambda o: o["gpu"].masked_fill(o["where"], 0.0), "found at least two devices, cuda:0 and cpu!"),
    "matmul": (lambda o: o["gpu"] @ o["cpu"], "got mat2 is on cpu, different from other tensors on cuda:0 "
                                              "(when checking argument in method wrapper_CUDA_mm)"),
    "cat": (lambda o: torch.cat([o["gpu"], o["cpu"]]), "got tensors is on cpu, different from other tensors on cuda:0 "
                                                       "(when checking argument in method wrapper_CUDA_cat)"),
    "index_select": (lambda o: o["gpu"].index_select(0, o["index"]), "got index is on cpu"),
    "gather": (lambda o: o["gpu"].gather(0, o["index"][None]), "got index is on cpu"),
    "embedding": (lambda o: F.embedding(o["index"], o["gpu"]), "wrapper_CUDA__index_select"),
    "linear": (lambda o: F.linear(o["gpu"], o["cpu"]), "wrapper_CUDA_"),
    "layer_norm": (lambda o: F.layer_norm(o["gpu"], (3,), o["cpu"][0]), "got weight is on cpu"),
    "cross_entropy": (lambda o: F.cross_entropy(o["gpu"], torch.tensor([0, 1, 2])), "got target is on cpu"),
    "gpu indices into cpu": (lambda o: o["cpu"][o["gpu_index"]],
                             "indices should be either on cpu or on the same device as the indexed tensor (cpu)"),
    "put elsewhere": (lambda o: _set(o["gpu"], o["index"], o["cpu"][:2]), "found at least two devices"),
    "index_add": (lambda o: o["gpu"].index_add_(0, o["gpu_index"], o["cpu"][:2]), "got source is on cpu"),
    "new tensor": (lambda o: o["gpu"] + torch.zeros_like(o["cpu"]), "found at least two devices"),
    "einsum": (lambda o: torch.einsum("ij,kj->ik", o["gpu"], o["cpu"]), "Expected all tensors"),
    "generator": (lambda o: torch.randn(2, device="cuda", generator=torch.Generator()),
                  "Expected a 'cuda' device type for generator but found 'cpu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGAL)
def test_legal(case: str) -> None:
    compute, device = LEGAL[case]
    with simulated_accelerator():
        result = compute(_operands())
        assert result.device == torch.device(device if device == "cpu" else "cuda:0")
        assert result.is_cuda == (device == "cuda")


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    compute, says = REFUSED[case]
    with simulated_accelerator(), pytest.raises(PlacementError) as caught:
        compute(_operands())
    assert says in str(caught.value)


@pytest.mark.parametrize("convert", [Tensor.numpy, Tensor.__array__])
def test_numpy_needs_the_host(convert: Callable[[Tensor], object]) -> None:
    with simulated_accelerator():
        tensor = torch.ones(2, device="cuda")
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            convert(tensor)
        convert(tensor.cpu())


def test_two_devices_do_not_mix() -> None:
    with simulated_accelerator(devices=2):
        first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(PlacementError, match="found at least two devices, cuda:0 and cuda:1!"):
            first + second
        with pytest.raises(PlacementError):
            first + second.sum()
        assert (first + second.to(first.device)).device.index == 0


def test_device_that_is_not_there() -> None:
    with simulated_accelerator(), pytest.raises(RuntimeError, match="CUDA error: invalid device ordinal"):
        torch.ones(1).to("cuda:1")
