"""One way of calling generate(), whoever wrote it: transformers' GenerationMixin or a module's own method.

What a generate() offers is read off its signature; what it does not offer makes a check not applicable, and says so.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.measuring.traces import hooked
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

# The names under which modules' own generate() take each control; the first is transformers' name.
CONTROLS: dict[str, tuple[str, ...]] = {
    "max_new_tokens": (
        "max_new_tokens", "max_tokens", "num_tokens", "n_tokens", "new_tokens", "num_new_tokens", "max_gen_len",
        "max_new", "steps", "n_steps",
    ),
    "max_length": ("max_length", "max_len", "total_len", "length", "max_seq_len"),
    "do_sample": ("do_sample", "sample", "sampling"),
    "greedy": ("greedy",),
    "temperature": ("temperature", "temp"),
    "top_k": ("top_k", "topk", "k"),
    "top_p": ("top_p", "topp", "nucleus", "p"),
    "min_p": ("min_p",),
    "repetition_penalty": ("repetition_penalty", "rep_penalty", "repeat_penalty"),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", "no_repeat_ngram"),
    "num_beams": ("num_beams", "beam_size", "beam_width", "beams"),
    "attention_mask": ("attention_mask", "mask", "attn_mask"),
    "eos_token_id": ("eos_token_id", "eos_id", "eos_token", "eos", "stop_token", "stop_token_id", "stop_id"),
    "pad_token_id": ("pad_token_id", "pad_id", "pad_token", "pad"),
}  # fmt: skip

# What a model's own generation config may set and a check must not inherit: everything that moves or ends sampling.
_INHERITED = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "guidance_scale", "penalty_alpha", "renormalize_logits",
    "remove_invalid_values", "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping",
    "num_return_sequences", "min_length", "min_new_tokens", "max_length", "max_new_tokens", "max_time",
    "stop_strings", "eos_token_id", "dola_layers", "watermarking_config", "constraints", "force_words_ids",
    "prompt_lookup_num_tokens", "output_scores", "output_logits", "return_dict_in_generate",
)  # fmt: skip


@dataclass
class Beams:
    """What beam search gave: new tokens [rows, time], and the score it claims for each row.

    `origins` [rows, time] is the beam that chose each token, -1 after a row's end, and `claimed` [rows, time] the
    log-probability it chose it for; both are None where generate() does not say. A row that ends is filled up with the
    padding token. `temperature` is what logits were divided by: 1 where generate() calls another module.
    """

    tokens: Tensor
    scores: Tensor
    origins: Tensor | None
    claimed: Tensor | None
    temperature: float

    def crossed(self) -> Tensor | None:
        """At which tokens [rows, time] a row's cache has come from the place of another beam, by one move or more.

        The first move does not count: all beams hold the prompt alone until then.
        """
        import torch

        if self.origins is None:
            return None
        moved = torch.zeros_like(self.origins, dtype=torch.bool)
        moved[:, 2:] = (self.origins[:, 1:-1] != self.origins[:, 2:]) & (self.origins[:, 2:] >= 0)
        return moved.cumsum(-1) > 0


class Generator:
    """generate() of one subject. New tokens only come back, [batch, time]; the prompt is cut off.

    The model is put into eval mode first, but with `mode_as_found`.
    """

    def __init__(self, subject: Specimen, *, mode_as_found: bool = False) -> None:
        self.subject = subject
        self.mode_as_found = mode_as_found
        self.holder = type(subject.module).__name__
        parameters = inspect.signature(subject.module.generate).parameters  # type: ignore[arg-type]
        self.hugging_face = "generation_config" in parameters
        self.quiet, self.stops_at_eos = "verbose" in parameters, "stop_at_eos" in parameters  # TransformerLens
        self.signature = ", ".join(parameters)
        named = [
            name
            for name, parameter in parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        self.names = {
            control: name
            for control, names in CONTROLS.items()
            if (name := next((name for name in names if name in named), None)) is not None
        }
        if self.hugging_face:
            self.names = {control: names[0] for control, names in CONTROLS.items() if control != "greedy"}
        else:
            known = {*named[:1], *self.names.values()}
            for name in named:
                if parameters[name].default is inspect.Parameter.empty and name not in known:
                    raise Unavailable(f"{self.holder}.generate({self.signature}): what {name} wants is not known here")
            if not {"max_new_tokens", "max_length"} & self.names.keys():
                raise Unavailable(f"{self.holder}.generate({self.signature}) takes no number of new tokens")

    def offers(self, control: str) -> bool:
        return control in self.names

    def require(self, *controls: str) -> None:
        """Raises Unavailable where generate() does not offer one of these."""
        for control in controls:
            if not self.offers(control):
                raise Unavailable(f"{self.holder}.generate({self.signature}) takes no {control}")

    def greedy(self, ids: Tensor, new: int, *, mask: Tensor | None = None, **controls: Any) -> Tensor:
        """The most likely tokens, at most `new`. Raises Unavailable where generate() can only sample."""
        return self._cut(self._call(ids, new, mask=mask, **self._greedily(), **controls), ids, new)

    def greedy_with_logits(
        self, ids: Tensor, new: int, *, mask: Tensor | None = None, **controls: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The same, with the logits [batch, time, vocab] that each step chose from, where generate() can say."""
        import torch

        if not self.hugging_face:
            return self.greedy(ids, new, mask=mask, **controls), None
        made = self._call(
            ids, new, mask=mask, do_sample=False, return_dict_in_generate=True, output_logits=True, **controls
        )
        logits = getattr(made, "logits", None)
        return self._cut(made, ids, new), torch.stack(logits, dim=1) if logits else None

    def sample(
        self, ids: Tensor, new: int, *, mask: Tensor | None = None, **controls: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Sampled tokens, and the probabilities [batch, vocab] that each step drew from.

        They are seen where torch.multinomial is called, so they are what was really sampled from; the list is empty
        for a generate() that draws in another way. Nothing but the controls given is in force.
        """
        neutral: dict[str, Any] = {"do_sample": True} if self.offers("do_sample") else {}
        if self.hugging_face:
            neutral.update(top_k=0, top_p=1.0, temperature=1.0)
        if self.offers("greedy"):
            neutral["greedy"] = False
        with _drawn() as drawn:
            tokens = self._cut(self._call(ids, new, mask=mask, **{**neutral, **controls}), ids, new)
        return tokens, [step.reshape(-1, step.shape[-1]) for step in drawn]

    def beams(self, ids: Tensor, new: int, *, beams: int, temperature: float = 1.0, **controls: Any) -> Beams:
        """Beam search with scores, transformers' way, on logits divided by `temperature`.

        They are divided where forward() returns them: generate() leaves its own temperature out of beam search, and a
        processor of its scores would have to normalise them again, and hide that generate() did not.
        """
        import torch
        from transformers.utils import ModelOutput

        applied = 1.0

        def flatten(module: Any, args: Any, output: Any) -> Any:
            nonlocal applied
            if not isinstance(output, ModelOutput):  # it generates in a way of its own
                return output
            applied = temperature
            output["logits"] = output["logits"].float() / temperature
            return output

        with hooked(self.subject.module.register_forward_hook(flatten)):
            found = self._call(
                ids, new, num_beams=beams, do_sample=False, return_dict_in_generate=True, output_scores=True, **controls
            )
        tokens = found.sequences[:, ids.shape[1] :]
        origins, steps = (getattr(found, name, None) for name in ("beam_indices", "scores"))
        claimed = None
        if origins is not None and steps and origins.shape == tokens.shape:
            by_step = torch.stack(steps[: tokens.shape[1]])  # [time, all beams, vocab]
            claimed = by_step[torch.arange(tokens.shape[1], device=tokens.device), origins.long().clamp(min=0), tokens]
        return Beams(tokens, found.sequences_scores, origins, claimed, applied)

    def as_users_call(self, ids: Tensor, new: int, *, sample: bool) -> Tensor:
        """With the model's own defaults in force, its end-of-text token included."""
        switch: dict[str, Any] = {"do_sample": sample} if self.offers("do_sample") else {}
        return self._cut(self._call(ids, new, inherit=True, **switch), ids, new)

    def _greedily(self) -> dict[str, Any]:
        if self.offers("do_sample"):
            return {"do_sample": False}
        if self.offers("greedy"):
            return {"greedy": True}
        if self.offers("top_k"):
            return {"top_k": 1}
        raise Unavailable(f"{self.holder}.generate({self.signature}) offers neither do_sample, greedy nor top_k=1")

    def _call(
        self, ids: Tensor, new: int, *, mask: Tensor | None = None, inherit: bool = False, **controls: Any
    ) -> Any:
        import torch

        if self.offers("max_new_tokens"):
            controls["max_new_tokens"] = new
        else:
            controls["max_length"] = ids.shape[1] + new
        if mask is not None:
            controls["attention_mask"] = mask
        if self.quiet:
            controls["verbose"] = False
        if self.stops_at_eos and "eos_token_id" not in controls:
            controls["stop_at_eos"] = False  # without a tokenizer there is none that it could know
        keywords = {self.names.get(name, name): value for name, value in controls.items()}
        module = self.subject.module
        if module.training and not self.mode_as_found:
            module.eval()
        with torch.no_grad(), _silence(), _own_config(module, inherit or not self.hugging_face):
            made = module.generate(ids, **keywords)  # type: ignore[operator]
            return list(made) if inspect.isgenerator(made) else made

    def _cut(self, made: Any, ids: Tensor, new: int) -> Tensor:
        """The new tokens [batch, at most new] in whatever generate() returned. Raises TypeError if there are none."""
        import torch

        batch, time = ids.shape
        made = getattr(made, "sequences", made)
        if isinstance(made, tuple):
            made = made[0]
        if isinstance(made, list):
            made = torch.cat([x.reshape(batch, -1) for x in made], 1) if made and torch.is_tensor(made[0]) else (
                torch.tensor(made)
            )  # fmt: skip
        if not isinstance(made, torch.Tensor):
            raise TypeError(f"generate() returned {type(made).__name__}, expected token ids [batch, time]")
        if made.dim() == 1:
            made = made[None]
        if made.shape[0] != batch:
            raise TypeError(f"generate() returned {list(made.shape)} for {batch} prompts, expected [batch, time]")
        if made.shape[1] >= time and torch.equal(made[:, :time].to(ids), ids):
            made = made[:, time:]
        return made


def pad_for(subject: Specimen, ids: Tensor) -> int:
    """A padding token that no prompt of `ids` holds: the model's own, if it may be."""
    used = set(ids.flatten().tolist())
    own = structure.special_ids(subject.module).get("pad_token_id")
    candidates = [*([own] if own is not None and own < subject.vocab_size else []), *range(subject.vocab_size)]
    return next((token for token in candidates if token not in used), 0)


@contextmanager
def _own_config(module: Any, inherit: bool) -> Iterator[None]:
    """While it lasts, the generation config keeps special tokens and sets nothing else; then it is put back."""
    before = getattr(module, "generation_config", None)
    if inherit or before is None:
        yield
        return
    bare = copy.deepcopy(before)
    for name in _INHERITED:
        if hasattr(bare, name):
            setattr(bare, name, None)
    module.generation_config = bare
    try:
        yield
    finally:
        module.generation_config = before


@contextmanager
def _silence() -> Iterator[None]:
    """transformers warns by the dozen about what is done here on purpose."""
    import warnings

    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _drawn() -> Iterator[list[Tensor]]:
    """The probabilities of every torch.multinomial call, as they come."""
    import torch
    from torch.overrides import TorchFunctionMode

    seen: list[Tensor] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (torch.multinomial, torch.Tensor.multinomial):
                given = (args[0] if args else kwargs["input"]).detach().clone()
                seen.append(given / given.sum(-1, keepdim=True))
            return func(*args, **kwargs)

    with Watch():
        yield seen
