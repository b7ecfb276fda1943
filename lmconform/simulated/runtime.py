"""What torch answers about its CUDA runtime while an accelerator is simulated: torch.cuda, generators, autocast."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import DeviceContext

from lmconform.simulated.tracking import CPU, Mark

if TYPE_CHECKING:
    from lmconform.simulated.accelerator import SimulatedAccelerator

_MEMORY = 80 << 30
CAPABILITY = (8, 0)

_DEVICE_WORDS = frozenset({"cuda", "accelerator", "is_torch_cuda_available"})

_serving: list[SimulatedAccelerator] = []
_registered: list[bool] = []
_probes: dict[str, list[Callable[[], None]]] = {}


@contextmanager
def pretended_runtime(accelerator: SimulatedAccelerator) -> Iterator[None]:
    """Replace the answers of torch's CUDA interface, and put the real ones back."""
    _register_storage_location()
    _forget_probes()
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for owner, answers in _answers(accelerator):
            for name, answer in answers.items():
                if hasattr(owner, name):
                    replaced.append((owner, name, owner.__dict__.get(name, getattr(owner, name))))
                    setattr(owner, name, answer)
        _serving.append(accelerator)
        yield
    finally:
        if accelerator in _serving:
            _serving.remove(accelerator)
        for owner, name, former in reversed(replaced):
            setattr(owner, name, former)
        _forget_probes()


def _answers(accelerator: SimulatedAccelerator) -> Iterator[tuple[Any, dict[str, Any]]]:
    count = len(accelerator.devices)

    def set_device(device: Any) -> None:
        place = accelerator.resolve(device)
        if place.type == "cuda":
            accelerator.current = place.index

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name="simulated accelerator", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=_MEMORY,
            multi_processor_count=108, warp_size=32, is_integrated=False, is_multi_gpu_board=False, gcnArchName="",
            max_threads_per_multi_processor=2048, shared_memory_per_block=49152, regs_per_multiprocessor=65536,
            shared_memory_per_block_optin=166912, L2_cache_size=40 << 20,
        )  # fmt: skip

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(int(number))

    def reseed() -> None:
        torch.default_generator.seed()

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    def get_state(device: Any = None) -> Any:
        return torch.default_generator.get_state()

    def set_state(state: Any, device: Any = None) -> None:
        torch.default_generator.set_state(state)

    def set_states(states: Any) -> None:
        for state in states:
            set_state(state)

    class pretended_device:
        """torch.cuda.device: the current device within a block."""

        def __init__(self, device: Any) -> None:
            place = None if device is None else accelerator.resolve(device)
            self.number = place.index if place is not None and place.type == "cuda" else None

        def __enter__(self) -> None:
            self.before = accelerator.current
            if self.number is not None:
                accelerator.current = self.number

        def __exit__(self, *raised: object) -> None:
            accelerator.current = self.before

    class device_of(pretended_device):
        def __init__(self, tensor: Any) -> None:
            super().__init__(accelerator.place(tensor))

    class Stream:
        """A stream or event that has nothing to wait for: everything has been computed when a call returns."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.device = accelerator.devices[accelerator.current]

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *raised: object) -> None:
            return None

        synchronize = wait_stream = wait_event = record = wait = nothing

        def query(self) -> bool:
            return True

        def is_capturing(self) -> bool:
            return False

        def record_event(self, event: Any = None) -> Any:
            return event or Stream()

        def elapsed_time(self, end: Any) -> float:
            return 0.0

    yield (
        torch.cuda,
        {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: count,
            "current_device": lambda: accelerator.current,
            "set_device": set_device,
            "device": pretended_device,
            "device_of": device_of,
            "init": nothing,
            "_lazy_init": nothing,
            "_lazy_call": lambda callback, **kwargs: None,
            "_is_in_bad_fork": lambda: False,
            "synchronize": nothing,
            "empty_cache": nothing,
            "ipc_collect": nothing,
            "get_device_name": lambda device=None: "simulated accelerator",
            "get_device_capability": lambda device=None: CAPABILITY,
            "get_device_properties": properties,
            "get_arch_list": lambda: [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"],
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_tf32_supported": lambda: False,
            "can_device_access_peer": lambda device, peer: True,
            "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
            "memory_allocated": zero,
            "max_memory_allocated": zero,
            "memory_reserved": zero,
            "max_memory_reserved": zero,
            "memory_stats": lambda device=None: {},
            "reset_peak_memory_stats": nothing,
            "reset_max_memory_allocated": nothing,
            "reset_accumulated_memory_stats": nothing,
            "Stream": Stream,
            "Event": Stream,
            "current_stream": lambda device=None: Stream(),
            "default_stream": lambda device=None: Stream(),
            "set_stream": nothing,
            "stream": lambda stream: nullcontext(stream),
            "is_current_stream_capturing": lambda: False,
            "manual_seed": seed,
            "manual_seed_all": seed,
            "seed": reseed,
            "seed_all": reseed,
            "initial_seed": lambda: torch.default_generator.initial_seed(),
            "default_generators": (torch.default_generator,) * count,
            "get_rng_state": get_state,
            "get_rng_state_all": lambda: [get_state() for _ in range(count)],
            "set_rng_state": set_state,
            "set_rng_state_all": set_states,
        },
    )
    yield (
        torch.cuda.random,
        {
            "get_rng_state": get_state,
            "set_rng_state": set_state,
            "manual_seed_all": seed,
            "manual_seed": seed,
        },
    )
    yield (
        torch.accelerator,
        {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "current_device_index": lambda: accelerator.current,
            "current_device_idx": lambda: accelerator.current,
            "set_device_index": set_device,
            "set_device_idx": set_device,
            "synchronize": nothing,
            "empty_cache": nothing,
            "current_stream": lambda device=None: Stream(),
        },
    )
    yield (
        torch,
        {
            "Generator": _generator_class(accelerator),
            "device": _device_class(torch.device),
            "Stream": Stream,
            "Event": Stream,
            "compile": _compile_eagerly,
            "range": _range(accelerator, getattr(torch, "range", None)),
            "is_autocast_enabled": _autocast_answer(torch.is_autocast_enabled),
            "get_autocast_dtype": _autocast_dtype(torch.get_autocast_dtype, torch.is_autocast_enabled),
        },
    )
    yield torch.amp.autocast_mode.autocast, {"__init__": _autocast_init(torch.amp.autocast_mode.autocast.__init__)}
    yield threading.Thread, {"run": _threads(accelerator, threading.Thread.run)}
    yield torch._C._nn, {"_parse_to": _parse_to(accelerator, torch._C._nn._parse_to)}
    yield DeviceContext, {"__torch_function__": _device_context(accelerator, DeviceContext.__torch_function__)}
    hooks = torch.autograd.graph.saved_tensors_hooks
    yield hooks, {"__init__": _saved_tensors(accelerator, hooks.__init__)}
    yield torch.autograd, {"_engine_run_backward": _engine(accelerator, torch.autograd._engine_run_backward)}


def _generator_class(accelerator: SimulatedAccelerator) -> type:
    real = torch.Generator

    class Generator(real):  # type: ignore[misc, valid-type]
        """A generator of the CPU that says where it belongs."""

        def __new__(cls, device: Any = "cpu") -> Any:
            place = accelerator.resolve(device)
            made = super().__new__(cls, "cpu" if place.type == "cuda" else place)
            made.place = place
            return made

        @property
        def device(self) -> torch.device:
            return self.place

    return Generator


def _device_class(real: type[torch.device]) -> type:
    """torch.device that understands a bare number, which needs an accelerator that the process has not."""

    class Meta(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, real)

        def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
            if len(args) == 1 and type(args[0]) is int and not kwargs:
                return real("cuda", args[0])
            return real(*args, **kwargs)

    # Pickling a device looks its class up under this name.
    return Meta("device", (), {"__module__": "torch", "__qualname__": "device"})


def _compile_eagerly(model: Any = None, **options: Any) -> Any:
    """torch.compile runs what it is given as it is: there is no kernel to compile for."""
    return (lambda function: function) if model is None else model


def _range(accelerator: SimulatedAccelerator, real: Any) -> Any:
    """The one constructor that tells no mode of itself."""

    def range(*args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = accelerator.mode.construct(real, args, kwargs)
        return made

    return range


def _autocast_init(real: Any) -> Any:
    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda":
            dtype = torch.get_autocast_dtype("cuda") if dtype is None else dtype
            device_type = "cpu"
        real(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    return init


def _autocast_answer(real: Any) -> Any:
    def is_autocast_enabled(device_type: str = "cuda") -> bool:
        return bool(real("cpu" if device_type == "cuda" else device_type))

    return is_autocast_enabled


def _autocast_dtype(real: Any, enabled: Any) -> Any:
    def get_autocast_dtype(device_type: str) -> torch.dtype:
        return real("cpu" if device_type == "cuda" and enabled("cpu") else device_type)

    return get_autocast_dtype


def _parse_to(accelerator: SimulatedAccelerator, real: Any) -> Any:
    """What nn.Module.to reads its arguments with, for a bare number and for a tensor to be like, too."""

    def parse_to(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], int):
            args = (torch.device("cuda", args[0]), *args[1:])
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        # It is a torch function itself: the mode would take it for one that makes tensors on that device.
        with torch._C.DisableTorchFunction():
            device, *others = real(*args, **kwargs)
        like = args[0] if args else kwargs.get("tensor")
        return (accelerator.place(like) if isinstance(like, torch.Tensor) else device, *others)

    return parse_to


def _device_context(accelerator: SimulatedAccelerator, real: Any) -> Any:
    """A `with torch.device("cuda")` lies above the placement mode; a default device lies below it, and was answered."""

    def function(self: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.device.type == "cuda" and not _mode_is_on(accelerator):
            return func(*args, **(kwargs or {}))
        return real(self, func, types, args, kwargs)

    return function


def _threads(accelerator: SimulatedAccelerator, real: Any) -> Any:
    """Modes belong to a thread: one that is started here (weights are loaded in some) gets its own."""

    def run(self: threading.Thread) -> None:
        with accelerator.mode:
            real(self)

    return run


def _saved_tensors(accelerator: SimulatedAccelerator, real: Any) -> Any:
    """Hooks on saved tensors (checkpointing, offloading) are called from within an operation, and must see devices.

    What the operation is about to return has no mark yet: it lies where the operation runs.
    """

    def within(hook: Any) -> Any:
        def call(*args: Any) -> Any:
            with accelerator.unmarked_at(accelerator.computing), _mode_on(accelerator):
                return hook(*args)

        return call

    def init(self: Any, pack_hook: Any, unpack_hook: Any) -> None:
        real(self, within(pack_hook), within(unpack_hook))

    return init


def _mode_on(accelerator: SimulatedAccelerator) -> Any:
    return nullcontext() if _mode_is_on(accelerator) else accelerator.mode


def _mode_is_on(accelerator: SimulatedAccelerator) -> bool:
    return any(mode is accelerator.mode for mode in torch.overrides._get_current_function_mode_stack())


def _engine(accelerator: SimulatedAccelerator, real: Any) -> Any:
    """The engine calls hooks, custom backwards and recomputed forwards: the placement mode is on within."""

    def run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        accumulate = kwargs.get("accumulate_grad", False)
        inputs = args[3] if len(args) > 3 else kwargs.get("inputs", ())
        place = next((accelerator.place(output) for output in outputs if isinstance(output, torch.Tensor)), CPU)
        with accelerator.unmarked_at(place), _mode_on(accelerator):
            gradients = real(outputs, *args, **kwargs)
        if not accumulate and isinstance(gradients, (tuple, list)):
            for tensor, gradient in zip(inputs, gradients):
                if isinstance(gradient, torch.Tensor) and isinstance(tensor, torch.Tensor):
                    mark = accelerator.ledger.mark(tensor)
                    if mark is not None:
                        accelerator.ledger.put(gradient, mark)
        return gradients

    return run


def _register_storage_location() -> None:
    """torch.save writes the pretended place, torch.load restores it (or raises what it raises without CUDA)."""
    if _registered:
        return
    _registered.append(True)

    def tag(storage: Any) -> str | None:
        if not _serving:
            return None
        untyped = getattr(storage, "_untyped_storage", storage)
        mark = getattr(untyped, _serving[-1].ledger.key, None)
        return str(mark.place) if mark is not None and mark.place.type == "cuda" else None

    def restore(storage: Any, location: str) -> Any:
        if not _serving or not location.startswith("cuda"):
            return None
        untyped = getattr(storage, "_untyped_storage", storage)
        setattr(untyped, _serving[-1].ledger.key, Mark(_serving[-1].resolve(location)))
        return storage

    torch.serialization.register_package(5, tag, restore)


def _forget_probes() -> None:
    """Empty what remembers whether there is a CUDA device."""
    for name in ("transformers.utils.import_utils", "torch._utils", "torch.utils._triton", "accelerate.utils.imports"):
        if name not in sys.modules:
            continue
        if name not in _probes:
            functions = list(vars(importlib.import_module(name)).values())
            clears = [(function, getattr(function, "cache_clear", None)) for function in functions]
            _probes[name] = [clear for function, clear in clears if callable(clear) and _asks_for_device(function)]
        for clear in _probes[name]:
            clear()


def _asks_for_device(function: Any) -> bool:
    names = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return names is not None and not _DEVICE_WORDS.isdisjoint(names.co_names)
