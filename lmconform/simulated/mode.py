"""The function mode: answers questions about devices, follows tensors, and hands mixed operands to CUDA's rules."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors

from lmconform.simulated.rules import PlacementRules
from lmconform.simulated.stray import PlacementError
from lmconform.simulated.tracking import CPU, Mark, holder, origin_of, tensors_in

if TYPE_CHECKING:
    from lmconform.simulated.accelerator import SimulatedAccelerator

Handler = Callable[[Any, tuple, dict], Any]

# Views, copies into a place, and questions that have nothing to do with places: passed through.
_UNMIXED = (
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "is_contiguous",
    "data_ptr", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "is_same_size",
    "item", "tolist", "__len__", "__bool__", "__int__", "__float__", "__index__", "__hash__", "__format__",
    "untyped_storage", "storage", "_typed_storage", "requires_grad_", "detach", "detach_", "view", "transpose",
    "permute", "expand", "unsqueeze", "squeeze", "narrow", "select", "unbind", "chunk", "split", "swapaxes",
    "view_as", "expand_as", "unflatten", "copy_", "backward", "register_hook", "register_post_accumulate_grad_hook",
    "retain_grad", "share_memory_", "is_shared", "record_stream", "__reduce_ex__", "__setstate__", "__dir__",
    "has_names", "_is_view", "set_",
)  # fmt: skip


def device_constructors() -> Set[Any]:
    """The functions of torch that make a tensor on the device of a `torch.device` context.

    torch keeps this set from its first use on. Where that is inside transformers' from_pretrained, torch.linspace is
    replaced at the time, and the set holds the replacement for ever; then it is made anew.
    """
    if torch.linspace not in _device_constructors():
        _device_constructors.cache_clear()
    known: Set[Any] = _device_constructors()
    return known


class PlacementMode(TorchFunctionMode):
    """Follows every call of torch's Python interface. See SimulatedAccelerator."""

    def __init__(self, accelerator: SimulatedAccelerator) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.ledger = accelerator.ledger
        self.key = accelerator.ledger.key
        self.handlers = self._handlers()
        self.retired = False  # a thread may outlive the simulation

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.retired:
            return func(*args, **(kwargs or {}))
        handler = self.handlers.get(func)
        if handler is not None:
            return handler(func, args, kwargs or {})
        return self._compute(func, args, kwargs or {})

    # -- computing -------------------------------------------------------------------------------------------------

    def _compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Any operation: run it where its operands are, or under CUDA's rules where they are in several places."""
        if kwargs and kwargs.get("device") is not None:
            return self._allocate(func, args, kwargs)
        key = self.key
        first: Mark | None = None
        place: torch.device | None = None
        mixed = count = 0
        waiting: list[Any] = [*args, *kwargs.values()] if kwargs else list(args)
        unmarked_is_cpu = self.accelerator.unmarked_place is None
        for value in waiting:  # grows while it runs: lists within lists
            if isinstance(value, Tensor):
                try:
                    mark = getattr(value.untyped_storage(), key, None)
                except (NotImplementedError, RuntimeError):
                    mark = getattr(holder(value), key, None)
                if mark is not None:
                    where = mark.place
                elif unmarked_is_cpu:
                    where = CPU
                else:
                    continue
                if not count:
                    first, place = mark, where
                elif where is not place:
                    mixed = 1
                count += 1
            else:
                kind = type(value)
                if kind is list or isinstance(value, tuple):  # named tuples too
                    waiting.extend(value)
                elif kind is dict:
                    waiting.extend(value.values())
        if mixed:
            return self._compute_mixed(func, args, kwargs)
        if place is not None:
            self.accelerator.computing = place
        result = func(*args, **kwargs)
        if place is not CPU:
            if first is not None:
                if isinstance(result, Tensor):
                    try:
                        storage = result.untyped_storage()
                    except (NotImplementedError, RuntimeError):
                        storage = holder(result)
                    if getattr(storage, key, None) is None:
                        setattr(storage, key, first)
                elif result is not None:
                    self.ledger.put_fresh(result, first)
        else:
            self._mark_computed_on_cpu(result, args, kwargs)
        return result

    def _mark_computed_on_cpu(self, result: Any, args: tuple, kwargs: dict) -> None:
        """Remember what a tensor on the CPU was computed from, in case it strays."""
        mark: Mark | None = None
        for tensor in tensors_in(result):
            if self.ledger.mark(tensor) is not None or tensor.device != CPU:
                continue
            sources = list(tensors_in([args, kwargs]))
            kept = holder(tensor)
            if sources and all(holder(source) is not kept for source in sources):
                mark = mark or self.ledger.derived(sources)
                self.ledger.put(tensor, mark)

    def _compute_mixed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors = list(tensors_in([args, kwargs]))
        if any(tensor.device != CPU for tensor in tensors):  # meta and the like: PyTorch judges for itself
            return func(*args, **kwargs)
        home = CPU
        for tensor in tensors:
            mark = self.ledger.mark(tensor)
            if mark is None:
                self.ledger.put(tensor, mark := Mark(CPU))
            if home is CPU:
                home = mark.place
        with PlacementRules(self.accelerator, home):
            return func(*args, **kwargs)

    def _allocate(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A call with device=: made on the CPU, and marked as lying on that device."""
        place = self.accelerator.resolve(kwargs["device"])
        if place.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        self._check_generator(kwargs.get("generator"), place)
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        kwargs["device"] = CPU
        result = func(*args, **kwargs)
        self.ledger.put_fresh(result, Mark(place, origin_of(func, True)))
        return result

    def _check_generator(self, generator: Any, place: torch.device) -> None:
        if generator is not None and generator.device.type != place.type:
            raise PlacementError(
                f"Expected a '{place.type}' device type for generator but found '{generator.device.type}'",
                operation="generator",
                devices=(str(place), str(generator.device)),
            )

    # -- making ----------------------------------------------------------------------------------------------------

    def construct(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """torch.zeros and its like: on device=, on the device of the context, or on the default device."""
        if kwargs.get("device") is not None:
            return self._allocate(func, args, kwargs)
        if args and isinstance(args[0], Tensor) and func is torch.tensor:
            place = self.accelerator.place(args[0])
        elif isinstance(kwargs.get("out"), Tensor):
            return self._compute(func, args, kwargs)
        else:
            place = self._default_device()
        if place.type not in ("cpu", "cuda"):
            return func(*args, **{**kwargs, "device": place})
        self._check_generator(kwargs.get("generator"), place)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "device")}
        result = func(*args, **kwargs, device=CPU)
        self.ledger.put_fresh(result, Mark(place, origin_of(func, False)))
        return result

    def _default_device(self) -> torch.device:
        for mode in reversed(_get_current_function_mode_stack()):
            if isinstance(mode, DeviceContext):
                return self.accelerator.resolve(mode.device)
        return CPU

    def _adopt(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """torch.as_tensor and torch.asarray: the same tensor where that is possible."""
        data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
        if not isinstance(data, Tensor):
            return self.construct(func, args, kwargs)
        device = kwargs.pop("device", None)
        result = func(*args, **kwargs)
        return self._move(result, device, False, func) if device is not None else result

    # -- moving ----------------------------------------------------------------------------------------------------

    def _move(self, tensor: Tensor, device: Any, copy: bool, func: Any, **options: Any) -> Tensor:
        target = self.accelerator.resolve(device)
        if target.type not in ("cpu", "cuda"):
            return tensor.to(target, copy=copy, **options)
        if tensor.device != CPU:  # from meta and the like
            result = tensor.to(CPU, copy=copy, **options)
            self.ledger.put_fresh(result, Mark(target, origin_of(func, True)))
            return result
        mark = self.ledger.mark(tensor)
        if (mark.place if mark else CPU) == target:
            result = tensor.to(copy=copy, **options) if options or copy else tensor
            self.ledger.put_fresh(result, mark or self.ledger.derived([tensor]))
            return result
        result = tensor.to(CPU, copy=True, **options)
        origin = origin_of(func, True)
        self.ledger.put(result, self.ledger.derived([tensor], origin) if target is CPU else Mark(target, origin))
        return result

    def _to(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensor, *rest = args
        options = dict(kwargs)
        if "other" in options:
            rest.insert(0, options.pop("other"))
        if rest and isinstance(rest[0], Tensor):
            other = rest.pop(0)
            options["dtype"], options["device"] = other.dtype, self.accelerator.place(other)
        elif rest and isinstance(rest[0], torch.dtype):
            options["dtype"] = rest.pop(0)
        elif rest:
            options["device"] = rest.pop(0)
            if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
                options["dtype"] = rest.pop(0)
        for name, value in zip(("non_blocking", "copy"), rest):
            options[name] = value
        device = options.pop("device", None)
        options.pop("non_blocking", None)
        copy = options.pop("copy", False)
        options = {name: value for name, value in options.items() if value is not None}
        if device is None:
            return self._compute(func, (tensor,), {**options, "copy": copy})
        return self._move(tensor, device, copy, func, **options)

    def _cuda(self, func: Any, args: tuple, kwargs: dict) -> Any:
        device = args[1] if len(args) > 1 else kwargs.get("device")
        options = {"memory_format": kwargs["memory_format"]} if "memory_format" in kwargs else {}
        return self._move(args[0], "cuda" if device is None else device, False, func, **options)

    def _cpu(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return self._move(args[0], CPU, False, func, **kwargs)

    def _type(self, func: Any, args: tuple, kwargs: dict) -> Any:
        wanted = args[1] if len(args) > 1 else kwargs.get("dtype")
        place = self.accelerator.place(args[0])
        if wanted is None:
            name = func(args[0])
            return name.replace("torch.", "torch.cuda.", 1) if place.type == "cuda" else name
        if isinstance(wanted, str) and wanted.startswith("torch.cuda."):
            return self._move(args[0].type(wanted.replace(".cuda", "", 1)), "cuda", False, func)
        return self._compute(func, args, kwargs)

    def _type_as(self, func: Any, args: tuple, kwargs: dict) -> Any:
        other = args[1] if len(args) > 1 else kwargs["other"]
        return self._move(args[0], self.accelerator.place(other), False, func, dtype=other.dtype)

    def _pin(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if self.accelerator.place(args[0]).type == "cuda":
            raise RuntimeError(f"cannot pin '{self._type(torch.Tensor.type, args[:1], {})}' only dense CPU tensors")
        result = args[0].clone()
        self.ledger.put_fresh(result, self.ledger.derived(args[:1]))
        return result

    # -- answering -------------------------------------------------------------------------------------------------

    def _device(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return self.accelerator.place(args[0])

    def _is_cuda(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return self.accelerator.place(args[0]).type == "cuda"

    def _is_cpu(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return self.accelerator.place(args[0]).type == "cpu"

    def _get_device(self, func: Any, args: tuple, kwargs: dict) -> Any:
        place = self.accelerator.place(args[0])
        return place.index if place.type == "cuda" else -1

    def _no(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return False

    def _numpy(self, func: Any, args: tuple, kwargs: dict) -> Any:
        place = self.accelerator.place(args[0])
        if place.type == "cuda" and not kwargs.get("force"):
            raise TypeError(
                f"can't convert {place} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return func(*args, **kwargs)

    def _repr(self, func: Any, args: tuple, kwargs: dict) -> Any:
        text = func(*args, **kwargs)
        place = self.accelerator.place(args[0])
        return f"{text[:-1]}, device='{place}')" if place.type == "cuda" and text.endswith(")") else text

    def _get_grad(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Gradients are made by the engine, which no mode sees: they lie with their tensor."""
        gradient = func(*args, **kwargs)
        if gradient is not None:
            mark = self.ledger.mark(args[0])
            if mark is not None and self.ledger.mark(gradient) is not mark:
                self.ledger.put(gradient, mark)
        return gradient

    def _set_grad(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensor, gradient = args
        if isinstance(gradient, Tensor):
            place, other = self.accelerator.place(tensor), self.accelerator.place(gradient)
            if place != other and self.accelerator.unmarked_place is None:
                raise PlacementError(
                    f"assigned grad has data located on a different device: {other}, while the tensor is on {place}",
                    operation="Tensor.grad",
                    devices=(str(place), str(other)),
                )
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """deepcopy: the copy lies where the original does."""
        result = func(*args, **kwargs)
        mark = self.ledger.mark(args[0])
        if mark is not None:
            self.ledger.put(result, mark)
            if result.grad is not None:
                self.ledger.put(result.grad, mark)
        return result

    # -- where CUDA's kernels differ -------------------------------------------------------------------------------

    def _histc(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """CUDA counts integers too, where the CPU has no kernel."""
        tensor = args[0] if args else kwargs["input"]
        if tensor.is_floating_point() or self.accelerator.place(tensor).type != "cuda":
            return self._compute(func, args, kwargs)
        counts = torch.histc(tensor.double(), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        counts = counts.to(tensor.dtype)
        self.ledger.put_fresh(counts, self.ledger.mark(tensor) or Mark(CPU))
        return counts

    def _multiply(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Matrix products with out_dtype: CUDA accumulates in that type, and the CPU has no such kernel."""
        kind = kwargs.get("out_dtype")
        if kind is None or all(self.accelerator.place(tensor).type == "cpu" for tensor in tensors_in([args, kwargs])):
            return self._compute(func, args, kwargs)
        marked = [(tensor.to(kind), self.ledger.mark(tensor)) for tensor in args]
        for tensor, mark in marked:
            self.ledger.put_fresh(tensor, mark or Mark(CPU))
        others = {name: value for name, value in kwargs.items() if name != "out_dtype"}
        return self._compute(func, tuple(tensor for tensor, _ in marked), others)

    def _pack(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Packing reads lengths on the host, and leaves batch sizes there."""
        result = func(*args, **kwargs)
        data, sizes = result
        self.ledger.put_fresh(data, self.ledger.mark(args[0]) or Mark(CPU))
        self.ledger.put_fresh(sizes, Mark(CPU))
        return result

    def _recur(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """torch.lstm and its like: packed input brings batch sizes, which stay on the host."""
        if len(args) > 1 and isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
            place = self.accelerator.place(args[0])
            rest = [args[0], *args[2:]]
            if place.type == "cuda" and all(self.accelerator.place(tensor) == place for tensor in tensors_in(rest)):
                result = func(*args, **kwargs)
                self.ledger.put_fresh(result, self.ledger.mark(args[0]) or Mark(place))
                return result
        return self._compute(func, args, kwargs)

    def _handlers(self) -> dict[Any, Handler]:
        table: dict[Any, Handler] = {}

        def through(func: Any, args: tuple, kwargs: dict) -> Any:
            return func(*args, **kwargs)

        for name, attribute in vars(torch._C.TensorBase).items():
            if hasattr(attribute, "__objclass__") and not callable(attribute):
                table[getattr(Tensor, name).__get__] = through
                if hasattr(attribute, "__set__"):
                    table[getattr(Tensor, name).__set__] = through
        for name in _UNMIXED:
            for owner in (Tensor, torch):
                if (func := getattr(owner, name, None)) is not None:
                    table[func] = through
        for constructor in device_constructors():
            table[constructor] = self.construct
        table |= {torch.as_tensor: self._adopt, torch.asarray: self._adopt}
        table |= {Tensor.to: self._to, Tensor.cuda: self._cuda, Tensor.cpu: self._cpu}
        table |= {Tensor.type: self._type, Tensor.type_as: self._type_as, Tensor.pin_memory: self._pin}
        attributes: Any = Tensor  # its attributes are descriptors, which the type stubs do not say
        table |= {attributes.device.__get__: self._device, attributes.is_cuda.__get__: self._is_cuda}
        table |= {attributes.is_cpu.__get__: self._is_cpu, Tensor.get_device: self._get_device}
        table |= {torch.get_device: self._get_device, Tensor.is_pinned: self._no, Tensor.__repr__: self._repr}
        table |= {attributes.numpy: self._numpy, Tensor.__array__: self._numpy, Tensor.__deepcopy__: self._copied}
        table |= {attributes.grad.__get__: self._get_grad, attributes.grad.__set__: self._set_grad}
        table |= {torch.histc: self._histc, Tensor.histc: self._histc}
        table |= {func: self._multiply for func in (torch.mm, torch.bmm, torch.addmm, torch.baddbmm)}
        table |= {torch._VF._pack_padded_sequence: self._pack}
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            table[getattr(torch._VF, name)] = self._recur
        return table
