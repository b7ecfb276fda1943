"""Everything that makes a tensor, under every way of saying on which device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmconform.simulated import PlacementError, simulated_accelerator
from lmconform.simulated.mode import device_constructors

FACTORIES: dict[str, Callable[..., Tensor]] = {
    "empty": lambda **k: torch.empty(2, **k),
    "empty_permuted": lambda **k: torch.empty_permuted((2, 3), (1, 0), **k),
    "empty_strided": lambda **k: torch.empty_strided((2,), (1,), **k),
    "ones": lambda **k: torch.ones(2, **k),
    "arange": lambda **k: torch.arange(2, **k),
    "bartlett_window": lambda **k: torch.bartlett_window(4, **k),
    "blackman_window": lambda **k: torch.blackman_window(4, **k),
    "eye": lambda **k: torch.eye(2, **k),
    "fft.fftfreq": lambda **k: torch.fft.fftfreq(4, **k),
    "fft.rfftfreq": lambda **k: torch.fft.rfftfreq(4, **k),
    "full": lambda **k: torch.full((2,), 1.0, **k),
    "hamming_window": lambda **k: torch.hamming_window(4, **k),
    "hann_window": lambda **k: torch.hann_window(4, **k),
    "kaiser_window": lambda **k: torch.kaiser_window(4, **k),
    "linspace": lambda **k: torch.linspace(0, 1, 3, **k),
    "logspace": lambda **k: torch.logspace(0, 1, 3, **k),
    "rand": lambda **k: torch.rand(2, **k),
    "randn": lambda **k: torch.randn(2, **k),
    "randint": lambda **k: torch.randint(3, (2,), **k),
    "randperm": lambda **k: torch.randperm(3, **k),
    "range": lambda **k: torch.range(0, 2, **k),
    "sparse_coo_tensor": lambda **k: torch.sparse_coo_tensor([[0]], [1.0], (2,), **k),
    "tril_indices": lambda **k: torch.tril_indices(3, 3, **k),
    "triu_indices": lambda **k: torch.triu_indices(3, 3, **k),
    "zeros": lambda **k: torch.zeros(2, **k),
    "tensor": lambda **k: torch.tensor([1.0], **k),
    "as_tensor": lambda **k: torch.as_tensor([1.0], **k),
    "asarray": lambda **k: torch.asarray([1.0], **k),
    "scalar_tensor": lambda **k: torch.scalar_tensor(1.0, **k),
    "signal.windows.hann": lambda **k: torch.signal.windows.hann(4, **k),
}

METHODS: dict[str, Callable[..., Tensor]] = {
    "new_empty": lambda t, **k: t.new_empty(2, **k),
    "new_empty_strided": lambda t, **k: t.new_empty_strided((2,), (1,), **k),
    "new_full": lambda t, **k: t.new_full((2,), 1.0, **k),
    "new_ones": lambda t, **k: t.new_ones(2, **k),
    "new_tensor": lambda t, **k: t.new_tensor([1.0], **k),
    "new_zeros": lambda t, **k: t.new_zeros(2, **k),
    "empty_like": lambda t, **k: torch.empty_like(t, **k),
    "full_like": lambda t, **k: torch.full_like(t, 1.0, **k),
    "ones_like": lambda t, **k: torch.ones_like(t, **k),
    "rand_like": lambda t, **k: torch.rand_like(t, **k),
    "randint_like": lambda t, **k: torch.randint_like(t, 3, **k),
    "randn_like": lambda t, **k: torch.randn_like(t, **k),
    "zeros_like": lambda t, **k: torch.zeros_like(t, **k),
}


UNTESTED = {  # files, and layouts that no language model is made of
    "empty_quantized", "from_file", "nested_tensor", "sparse_bsc_tensor", "sparse_bsr_tensor",
    "sparse_compressed_tensor", "sparse_csc_tensor", "sparse_csr_tensor",
}  # fmt: skip


def test_every_factory_is_here() -> None:
    named = {name.replace("fft.", "fft_") for name in FACTORIES}
    assert sorted({function.__name__ for function in device_constructors()} - named - UNTESTED) == []


@pytest.mark.filterwarnings("ignore:torch.range is deprecated", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", FACTORIES)
def test_factories_go_where_they_are_told(name: str) -> None:
    make = FACTORIES[name]
    with simulated_accelerator(devices=2):
        second = torch.device("cuda:1")
        assert make().device.type == "cpu"
        assert make(device="cpu").device.type == "cpu"
        for device, place in (("cuda", 0), (torch.device("cuda", 1), 1), (1, 1)):
            assert make(device=device).device == torch.device("cuda", place)
        with torch.device(second):
            assert make().device == second
            assert make(device="cpu").device.type == "cpu"
        with torch.device("cuda:0"), torch.device("cpu"):  # the inner one counts
            assert make().device.type == "cpu"
        torch.set_default_device(second)
        try:
            assert make().device == second
        finally:
            torch.set_default_device(None)
        assert make().device.type == "cpu"
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            make(device="cuda:7")


@pytest.mark.parametrize("name", METHODS)
def test_likes_follow_their_tensor(name: str) -> None:
    make = METHODS[name]
    with simulated_accelerator(devices=2):
        for place in ("cpu", "cuda:0", "cuda:1"):
            tensor = torch.ones(2, device=place)
            with torch.device("cuda:0"):  # a context says nothing to these
                assert make(tensor).device == torch.device(place)
            assert make(tensor, device="cuda:1").device == torch.device("cuda:1")
            assert make(tensor, device="cpu").device.type == "cpu"


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "add_": lambda a, b: a.add_(b),
    "mul_": lambda a, b: a.mul_(b),
    "+=": lambda a, b: a.__iadd__(b),
    "clamp_": lambda a, b: a.clamp_(min=b),
    "addmm_": lambda a, b: a.addmm_(b, b),
    "masked_fill_": lambda a, b: a.masked_fill_(b > 0, 1.0),
    "masked_scatter_": lambda a, b: a.masked_scatter_(b > 0, b),
    "index_copy_": lambda a, b: a.index_copy_(0, torch.arange(3, device=a.device), b),
    "scatter_add_": lambda a, b: a.scatter_add_(0, torch.zeros(3, 3, dtype=torch.int64, device=a.device), b),
    "where out": lambda a, b: torch.where(a > 0, a, a, out=b),
    "add out": lambda a, b: torch.add(a, a, out=b),
    "matmul out": lambda a, b: torch.matmul(a, a, out=b),
    "cat out": lambda a, b: torch.cat([a], out=b),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_and_out_forms(name: str) -> None:
    operate = IN_PLACE[name]
    with simulated_accelerator(devices=2):
        for place in ("cuda:0", "cuda:1"):
            assert operate(torch.ones(3, 3, device=place), torch.ones(3, 3, device=place)).device == torch.device(place)
        for one, other in (("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1")):
            with pytest.raises(PlacementError):
                operate(torch.ones(3, 3, device=one), torch.ones(3, 3, device=other))
