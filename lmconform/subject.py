"""Subject: what a user hands over, a model or the way to build one, and how it becomes a Specimen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from lmconform.compiled import as_written
from lmconform.conventions import find_convention, first_line
from lmconform.devices import Device, DeviceError
from lmconform.global_state import global_state_kept
from lmconform.outputs import ConventionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lmconform.specimen import Specimen


_handed_out: WeakSet[nn.Module] = WeakSet()  # by builders, some of which give the same module each time


class BuildError(Exception):
    """The subject could not be built; the text says what was tried and what came of it (exit code 2)."""


@dataclass(frozen=True)
class UnloadableTokenizer:
    """What stands in for a checkpoint's tokenizer that is there and cannot be loaded."""

    reason: str


class Subject:
    """One causal language model to be checked.

    `model_or_builder` is an `nn.Module`, or a callable without arguments that returns one, a `(model, tokenizer)` pair
    or a `(model, tokenizer, recipe)` triple. `call(model, input_ids, **kw) -> logits` says how to call it where that
    cannot be found out: ids are int64 [batch, time], logits [batch, time, vocab]; whatever other inputs `call` names
    (attention_mask, position_ids, past_key_values, inputs_embeds, labels) are used.
    """

    def __init__(
        self,
        model_or_builder: Any,
        *,
        name: str | None = None,
        call: Callable[..., Any] | None = None,
        tokenizer: Any = None,
        recipe: Any = None,
    ) -> None:
        if not callable(model_or_builder):
            raise TypeError(
                "a subject is an nn.Module or a callable without arguments that returns one, "
                f"not {type(model_or_builder).__name__}"
            )
        self.model_or_builder = model_or_builder
        self.name = name or _name_of(model_or_builder)
        self.spec = ""  # set where a SPEC named it
        self.call = call
        self.tokenizer = tokenizer or getattr(recipe, "tokenizer", None)
        self.recipe = recipe
        self.tokenizer_trouble = ""

    @property
    def source(self) -> str:
        """A SPEC that builds it again: the one that named it, else `file.py:attr` of a builder; else empty."""
        if self.spec:
            return self.spec
        given = self.model_or_builder
        code = getattr(given, "__init__", None) if isinstance(given, type) else given
        name, file = getattr(given, "__qualname__", ""), getattr(getattr(code, "__code__", None), "co_filename", "")
        if not name.isidentifier() or not file.endswith(".py"):
            return ""
        place = Path(file)
        return f"{place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place}:{name}"

    def __repr__(self) -> str:
        return f"Subject({self.name})"

    def open(
        self,
        *,
        seed: int = 0,
        device: str | Device = "cpu",
        dtype: str | None = None,
        as_loaded: bool = False,
        announce: Callable[[str], None] = lambda text: None,
    ) -> Specimen:
        """Build the model, excite its weights (unless `as_loaded`) and find out how it is called.

        On a simulated device ("sim") the specimen is to be used within `specimen.placed()`. Raises BuildError with the
        whole reason.
        """
        home, number = resolve_device(device) if isinstance(device, str) else device, resolve_dtype(dtype)
        with home.active(), global_state_kept():
            return self._open(home, number, seed, as_loaded, announce)

    def _open(
        self, home: Device, dtype: torch.dtype | None, seed: int, as_loaded: bool, announce: Callable[[str], None]
    ) -> Specimen:
        import torch

        from lmconform.copies import convert
        from lmconform.excitation import excite
        from lmconform.specimen import Specimen, random_ids

        given = self.model_or_builder
        if isinstance(given, torch.nn.Module):
            module = as_written(_announced_copy(given, announce), announce)
            builder = None
        else:
            module = self._build(seed, announce)
            builder = self._build
        pristine: Callable[[], nn.Module] | None = None
        if not as_loaded:
            pristine = _pristine(self, module, seed)
        try:
            module = home.put(convert(module, dtype) if dtype else module, announce)
        except Exception as error:
            raise BuildError(
                f"{self.name}: .to({home.place}) raised {type(error).__name__}: {first_line(error)}"
            ) from error
        if not as_loaded:
            excite(module, seed)
        module.eval()
        ids = random_ids(list(range(3, 8)), 2, 5, torch.Generator().manual_seed(0)).to(home.place)
        try:
            convention, vocab_size = find_convention(module, ids, self.call)
        except ConventionError as error:
            text = _there_alone(module, ids, self.call, home, error) or str(error)
            raise BuildError(f"{self.name}: {text}") from error
        except SystemExit as error:
            raise BuildError(f"{self.name}: forward() called sys.exit({error.code!r})") from error
        return Specimen(
            module,
            convention,
            vocab_size,
            name=self.name,
            spec=self.spec,
            source=self.source,
            seed=seed,
            builder=builder,
            pristine=pristine,
            tokenizer=self.tokenizer,
            tokenizer_trouble=self.tokenizer_trouble,
            recipe=self.recipe,
            home=home,
            converted=dtype is not None,
            announce=announce,
        )

    def _build(self, seed: int, announce: Callable[[str], None] | None = None) -> nn.Module:
        """Call the builder under `seed`, leaving the caller's random state alone; what it compiled is as written."""
        import torch

        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = self.model_or_builder()
        except BuildError:
            raise
        except SystemExit as error:
            raise BuildError(f"{self.name}: the builder called sys.exit({error.code!r})") from error
        except MemoryError as error:
            raise BuildError(f"{self.name}: the builder ran out of memory") from error
        except Exception as error:
            raise BuildError(
                f"{self.name}: the builder raised {type(error).__name__}: {first_line(error)}{_raised_at(error)}"
            ) from error
        if isinstance(made, tuple) and len(made) in (2, 3):
            made, tokenizer, *rest = made
            self.recipe = self.recipe or next(iter(rest), None)
            if isinstance(tokenizer, UnloadableTokenizer):
                self.tokenizer_trouble, tokenizer = tokenizer.reason, None
            self.tokenizer = self.tokenizer or tokenizer or getattr(self.recipe, "tokenizer", None)
        if isinstance(made, Subject):
            raise BuildError(f"{self.name}: the builder returned a Subject; give the Subject itself as the spec")
        if not isinstance(made, torch.nn.Module):
            raise BuildError(
                f"{self.name}: the builder returned {type(made).__name__}, expected an nn.Module, "
                "a (model, tokenizer) pair or a (model, tokenizer, recipe) triple"
            )
        if made in _handed_out:  # it may be in use as it was built the last time
            try:
                made = copy.deepcopy(made)
            except Exception as error:
                raise BuildError(
                    f"{self.name}: the builder returned the module that it returned before, which cannot be copied "
                    f"({type(error).__name__}: {first_line(error)}); let it build a new one each time"
                ) from error
        _handed_out.add(made)
        return as_written(made, announce)


def _there_alone(module: nn.Module, ids: Tensor, call: Any, home: Device, error: ConventionError) -> str:
    """What to say of a model that gives logits on the CPU and not where it was moved; empty for every other."""
    if home.place.type == "cpu" or not error.tried:
        return ""
    try:
        find_convention(module.to("cpu"), ids.cpu(), call)
    except Exception:
        return ""
    return (
        f"it gives logits on the CPU, and on {home.name} {error.tried[0]}\n"
        "The same on the CPU with --select placement names whatever else stays behind."
    )


def as_subject(given: Any, *, trust_remote_code: bool = False) -> Subject:
    """A Subject from a Subject, a module, a builder or a SPEC. Raises BuildError or TypeError."""
    if isinstance(given, Subject):
        return given
    if isinstance(given, str):
        from lmconform.loading import load_spec

        return load_spec(given, trust_remote_code=trust_remote_code)
    return Subject(given)


def resolve_device(device: str) -> Device:
    """The device of that name. Raises BuildError where it is not there."""
    try:
        return Device(device)
    except DeviceError as error:
        raise BuildError(str(error)) from error


def resolve_dtype(dtype: str | None) -> Any:
    """A floating torch.dtype by name, None for the model's own. Raises BuildError."""
    import torch

    if dtype is None:
        return None
    number = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise BuildError(f"dtype {dtype!r} is none of float32, float64, bfloat16, float16")
    return number


def _announced_copy(module: nn.Module, announce: Callable[[str], None]) -> nn.Module:
    """The user's own module is never touched: a copy is checked."""
    from lmconform.specimen import LARGE, available_memory

    need = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    if need > LARGE:
        announce(f"a copy takes {need / 2**30:.1f} GiB; {available_memory() / 2**30:.1f} GiB are free")
    if need > available_memory():
        raise BuildError(
            f"a copy of the model would take {need / 2**30:.1f} GiB and {available_memory() / 2**30:.1f} GiB are free"
        )
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise BuildError(
            f"the model cannot be copied ({type(error).__name__}: {first_line(error)}); "
            "give a builder, a callable that returns it, instead"
        ) from error


def _pristine(subject: Subject, module: nn.Module, seed: int) -> Callable[[], nn.Module]:
    given = subject.model_or_builder
    import torch

    if isinstance(given, torch.nn.Module):
        return lambda: as_written(copy.deepcopy(given))
    state = {key: value.clone() for key, value in module.state_dict().items()} if _small(module) else None

    def rebuild() -> nn.Module:
        fresh = subject._build(seed)
        if state is not None:  # a builder that ignores the seed would give other weights
            fresh.load_state_dict(state)
        return fresh

    return rebuild


def _small(module: nn.Module) -> bool:
    return sum(p.numel() for p in module.parameters()) < 50_000_000


def _name_of(given: Any) -> str:
    return getattr(given, "__name__", None) or type(given).__name__


def _raised_at(error: BaseException) -> str:
    """' (at model.py:12)': the last line of the traceback, for a one-line message."""
    simulated = str(Path(__file__).parent / "simulated")
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(simulated)]
    return f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
