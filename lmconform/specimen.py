"""A subject that has been built: one model, seen through one calling convention. Checks receive this."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform import capabilities, structure, tolerance
from lmconform.borrowed import Change, borrowed
from lmconform.conventions import Convention, first_line
from lmconform.copies import cast, convert, dtype_of, empty_containers, give_weights, shares_memory
from lmconform.exact_masks import masks_in_the_querys_type
from lmconform.outputs import Output

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lmconform.devices import Device

LARGE = 1 << 30  # bytes of weights from which a copy is announced, and avoided where it can be
PROBED = (128, 256, 512, 1024)  # tokens: the last, then the others until one is refused, where no context is stated


class Unavailable(Exception):
    """A check cannot run on this subject, for a reason worth a sentence: it becomes `not_applicable`."""


class Specimen:
    """A built model and everything that checks ask of it.

    `forward` runs in eval mode and without gradients unless told otherwise. Ids are int64 [batch, time], logits
    [batch, time, vocab].
    """

    def __init__(
        self,
        module: nn.Module,
        convention: Convention,
        vocab_size: int,
        *,
        name: str,
        spec: str = "",
        source: str = "",
        seed: int = 0,
        builder: Callable[[int], nn.Module] | None = None,
        pristine: Callable[[], nn.Module] | None = None,
        tokenizer: Any = None,
        tokenizer_trouble: str = "",
        recipe: Any = None,
        reference: Specimen | None = None,
        home: Device | None = None,
        converted: bool = False,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.module = module
        self.convention = convention
        self.vocab_size = vocab_size
        self.name = name
        self.spec = spec  # empty where no SPEC named it
        self.source = source  # a SPEC that builds it again; empty where there is none
        self.seed = seed
        self.builder = builder
        self.tokenizer = tokenizer
        self.tokenizer_trouble = tokenizer_trouble  # why the checkpoint's own could not be loaded
        self.recipe = recipe
        self.reference = reference
        self.home = home
        self.converted = converted  # to a type that was asked for: buffers too, which from_pretrained would not do
        self.announce = announce
        self._pristine = pristine
        self._capabilities: dict[str, capabilities.Capability] = {}
        self._twin: Specimen | bool | None = False
        self._loaded: Specimen | None = None
        self._wider = False  # a float64 copy of a narrower model: evidence, not the model that is judged

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any | None:
        return structure.config_of(self.module)

    @property
    def model_type(self) -> str | None:
        """transformers' name of the architecture, where the class comes from transformers."""
        if not type(self.module).__module__.startswith("transformers."):
            return None
        return getattr(getattr(self.module, "config", None), "model_type", None)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (the first floating parameter's)."""
        return dtype_of(self.module)

    @property
    def device(self) -> torch.device:
        import torch

        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def placed(self) -> AbstractContextManager[Any]:
        """Within, its device is there: needed around every use of a subject on a simulated device. Runner does it."""
        return nullcontext() if self.home is None else self.home.active()

    def put(self, module: nn.Module) -> nn.Module:
        """`module` moved to where this subject's module is."""
        return module.to(self.device) if self.home is None else self.home.put(module)

    @functools.cached_property
    def context_length(self) -> int | None:
        """How many tokens it takes: stated, or found by trying up to 1024; None where no limit was met."""
        stated = structure.context_length(self.module)
        if stated is not None:
            return stated
        low, high = 5, PROBED[-1]
        refusal = self._refusal(high)
        if refusal is None:
            return None
        for time in PROBED[:-1]:
            refused = self._refusal(time)
            if refused is not None:
                high, refusal = time, refused
                break
            low = time
        while high - low > 1:
            middle = (low + high) // 2
            refused = self._refusal(middle)
            low, high, refusal = (middle, high, refusal) if refused is None else (low, middle, refused)
        self.announce(f"no context length is stated; taken as {low} tokens, since {high} raise {refusal}")
        return low

    def _refusal(self, time: int) -> str | None:
        """What a call with that many tokens raises; None where it runs. Want of memory says nothing of the context."""
        try:
            self.logits(self.probe_ids(1, time))
        except MemoryError:
            raise
        except Exception as error:
            if "allocate memory" in str(error):
                raise
            return f"{type(error).__name__}: {first_line(error)}"
        return None

    @functools.cached_property
    def window(self) -> int | None:
        """The stated sliding window in tokens."""
        return structure.window(self.module)

    def longest(self, wanted: int) -> int:
        """`wanted` tokens, or as many as the context takes."""
        return wanted if self.context_length is None else min(wanted, self.context_length)

    @functools.cached_property
    def ordinary_ids(self) -> list[int]:
        """Token ids that no config calls special (all ids, where too few would be left)."""
        special = set(structure.special_ids(self.module).values()) | {0, 1, 2}
        ordinary = [i for i in range(min(self.vocab_size, 50_000)) if i not in special]
        return ordinary if len(ordinary) >= 4 else list(range(self.vocab_size))

    def probe_ids(self, batch: int = 2, time: int = 5) -> Tensor:
        """A few legal tokens [batch, time], the same every time."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return random_ids(self.ordinary_ids, batch, time, generator).to(self.device)

    @functools.cached_property
    def first_position(self) -> int:
        """The k among 0 and padding token + 1 (RoBERTa) for which position_ids k, k + 1, ... repeat the default.

        0 where none does, or where the model takes no positions.
        """
        import torch

        token = structure.special_ids(self.module).get("pad_token_id")
        if self.convention.positions is None or token is None:
            return 0
        ids = self.probe_ids(1, self.longest(5))
        default = self.logits(ids)
        bound = tolerance.allowed(self.noise, default)
        for first in (0, token + 1):
            try:
                counted = self.logits(ids, positions=torch.arange(ids.shape[1], device=ids.device)[None] + first)
            except Exception:  # beyond a table's end, or no positions of that shape: the checks say so
                return 0
            if float((counted - default).abs().max()) <= bound:
                return first
        return 0

    def can(self, name: str) -> capabilities.Capability:
        """Whether it has that capability, probed once."""
        if name not in self._capabilities:
            self._capabilities[name] = capabilities.probe(self, name)
        return self._capabilities[name]

    # -- calling it ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        embeds: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        train: bool = False,
        grad: bool = False,
    ) -> Output:
        """One call. `mask` [batch, past + time] of 1 and 0; `labels` as the model's own convention wants them."""
        import torch

        if self.module.training != train:
            self.module.train(train)
        with torch.set_grad_enabled(grad), masks_in_the_querys_type() if self._wider else nullcontext():
            return self.convention.run(
                self.module,
                input_ids,
                mask=mask,
                positions=positions,
                cache=cache,
                use_cache=use_cache,
                embeds=embeds,
                labels=labels,
                hidden_states=hidden_states,
                attentions=attentions,
            )

    def logits(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """`forward(...).logits`, checked to be [batch, time, vocab].

        Without a cache in play the call asks for none (`use_cache=False`), as training does.
        """
        if "use_cache" not in inputs and inputs.get("cache") is None:
            inputs["use_cache"] = False
        return self.forward(input_ids, **inputs).logits

    def embed(self, input_ids: Tensor) -> Tensor:
        """The token embeddings that `inputs_embeds` stands for: [batch, time, width]."""
        table = structure.embedding(self.module, self.vocab_size)
        if table is None:
            raise Unavailable("no token embedding found")
        return table(input_ids)

    # -- copies ----------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _derive(self, module: nn.Module, **changes: Any) -> Specimen:
        import torch

        keep: dict[str, Any] = {
            "name": self.name, "spec": self.spec, "source": self.source, "seed": self.seed, "builder": self.builder,
            "pristine": self._pristine, "tokenizer": self.tokenizer, "recipe": self.recipe,
            "tokenizer_trouble": self.tokenizer_trouble,
            "reference": self.reference, "home": self.home, "converted": self.converted, "announce": self.announce,
        }  # fmt: skip
        keep.update(changes)
        derived = Specimen(module, self.convention, self.vocab_size, **keep)
        derived._capabilities = dict(self._capabilities)
        derived._wider = self._wider or (derived.dtype == torch.float64 != self.dtype)
        return derived

    def copy(self) -> Specimen:
        """An independent copy: change its weights at will. Raises Unavailable where the model cannot be copied."""
        return self._derive(self._copied_module())

    def _copied_module(self) -> nn.Module:
        self._afford(self.weight_bytes, "a copy")
        try:
            copied = copy.deepcopy(self.module, empty_containers(self.module))
        except Exception as error:
            if self.builder is None:
                raise Unavailable(f"the model cannot be copied: {type(error).__name__}: {error}") from error
        else:
            if self.builder is None or not shares_memory(copied, self.module):
                return copied
        fresh = self.builder(self.seed)
        give_weights(fresh, self.module)
        return self.put(cast(fresh, self.dtype)).train(self.module.training)

    @property
    def is_large(self) -> bool:
        """Whether copies borrow the weights where they can, and none is kept."""
        return self.weight_bytes > LARGE

    def lent(self) -> Specimen:
        """A copy of a large model in the memory of its weights, for whoever changes none of them; else a whole one.

        Whole where the model is not large, because a forward may change weights itself (nGPT normalises them).
        """
        if not self.is_large:
            return self.copy()
        try:
            return self._derive(borrowed(self.module))
        except Exception:
            return self.copy()

    def changed(self, change: Change) -> Specimen:
        """A copy of a large model whose weights are changed as a forward reaches them; see lmconform.borrowed."""
        try:
            return self._derive(borrowed(self.module, change))
        except Exception as error:
            raise Unavailable(f"the model cannot be copied: {type(error).__name__}: {error}") from error

    def twin(self) -> Specimen | None:
        """A float64 copy, made once; None where the model does not run in float64, or says something else there."""
        if isinstance(self._twin, bool):
            self._twin = self._make_twin()
        return self._twin

    def whole_twin(self) -> Specimen | None:
        """The same with weights of its own, which take gradients; of a large model made anew each time."""
        return self._make_twin(whole=True) if self.is_large else self.twin()

    def forget_twin(self) -> None:
        """Drop a borrowed copy that may have been cut off in the middle of a forward."""
        if self.is_large:
            self._twin = False

    def _make_twin(self, *, whole: bool = False) -> Specimen | None:
        import torch

        if self.dtype == torch.float64:
            return None
        try:
            own = self.logits(self.noise_ids).double()
            twin = self._widened(whole=whole or not self.is_large)
            set_experts = getattr(twin.module, "set_experts_implementation", None)
            if callable(set_experts):  # the grouped kernels take no float64
                set_experts("eager")
            logits = twin.logits(self.noise_ids)
        except Exception:
            return None
        if logits.dtype != torch.float64 or not bool(logits.isfinite().all()):
            return None
        apart = tolerance.typical(own - logits)
        if apart > tolerance.TWIN_APART * self.perturbation:
            self.announce(
                f"its float64 copy is no evidence and is left out: the logits differ by {apart:.3g}, where rounding "
                f"explains {self.perturbation:.3g}; something in it depends on the type, or on chance"
            )
            return None
        return twin

    def _widened(self, *, whole: bool) -> Specimen:
        import torch

        if whole:
            self._afford(self.weight_bytes * 8 // max(1, self.dtype.itemsize), "a float64 copy")
            return self._derive(convert(self._copied_module(), torch.float64))
        widened = self.changed(lambda name, weight: weight.double() if weight.is_floating_point() else weight)
        for part in widened.module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    part._buffers[name] = buffer.double()
        widened.dtype, widened._wider = torch.float64, True
        return widened

    def fresh(self, seed: int) -> Specimen:
        """Built anew under that seed, weights as the builder leaves them. Raises Unavailable without a builder."""
        if self.builder is None:
            raise Unavailable(str(self.can("rebuild").reason))
        return self._derive(self.put(cast(self.builder(seed), self.dtype)).eval(), seed=seed)

    def unused(self) -> Specimen:
        """A copy that no forward has run through yet: built anew and given these weights, where that can be done.

        What a model makes in its first forward is not there yet.
        """
        if self.builder is None or self.is_large:
            return self.copy()
        made = self.fresh(self.seed)
        give_weights(made.module, self.module)
        return made

    def as_loaded(self) -> Specimen:
        """The model with the weights it came with, before excitation; made once, where it is not large."""
        if self._pristine is None:
            return self
        if self._loaded is not None:
            return self._loaded
        self._afford(self.weight_bytes, "the model as it was loaded")
        loaded = self._derive(self.put(cast(self._pristine(), self.dtype)).eval(), pristine=None)
        if not self.is_large:
            self._loaded = loaded
        return loaded

    def _afford(self, need: int, what: str) -> None:
        available = available_memory()
        if need > LARGE:
            self.announce(f"{what} of {self.name} takes {need / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are free")
        if need > available:
            raise Unavailable(
                f"{what} would take {need / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
                "check a smaller configuration of the same code"
            )

    # -- tolerance -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def noise(self) -> float:
        """The noise floor of the logits, in logits; see lmconform.tolerance."""
        return tolerance.noise_floor(self)

    @functools.cached_property
    def noise_ids(self) -> Tensor:
        """What noise is measured on: [2, up to 40]."""
        return self.probe_ids(2, self.longest(40))

    @functools.cached_property
    def perturbation(self) -> float:
        """What moving every weight by one unit in the last place does to the logits, in logits."""
        return tolerance.perturbation(self, self.noise_ids)

    def scaled(self, factor: float) -> Specimen:
        """A copy whose matrices are `factor` times as large: attention becomes hard, soft masks leak."""
        import torch

        if self.is_large:
            return self.changed(lambda name, weight: weight * factor if weight.dim() >= 2 else weight)
        copied = self.copy()
        with torch.no_grad():
            for parameter in copied.module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(factor)
        return copied


def random_ids(ordinary: list[int], batch: int, time: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn evenly from `ordinary`, [batch, time]."""
    import torch

    table = torch.tensor(ordinary)
    return table[torch.randint(len(ordinary), (batch, time), generator=generator)]


def available_memory() -> int:
    """Bytes of memory that can still be had, as the system estimates it, within the container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(counted.get("inactive_file", 0))
            free = min(free, max(0, int(limit) - used))
    except FileNotFoundError:  # no cgroup of version 2, or its root, which has no limit
        pass
    return free
