"""How a model is called is found out, whatever it looks like."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmconform import BuildError, Subject, check_model

VOCAB = 37


class Core(nn.Module):
    """Embedding and head; a subclass calls `compute` in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)

    def compute(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class TensorOut(Core):
    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class UnknownName(Core):
    def forward(self, sequence: Tensor) -> Tensor:
        return self.compute(sequence)


class TupleOut(Core):
    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.compute(tokens), None


class DictOut(Core):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.compute(input_ids)}


@dataclass
class Answer:
    logits: Tensor


class DataclassOut(Core):
    def forward(self, ids: Tensor) -> Answer:
        return Answer(self.compute(ids))


NamedAnswer = namedtuple("NamedAnswer", "loss logits")


class NamedTupleOut(Core):
    def forward(self, input_ids: Tensor) -> NamedAnswer:
        return NamedAnswer(None, self.compute(input_ids))


class NanoGPT(Core):
    """All logits only when targets are passed."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.compute(idx)
        if targets is None:
            return logits[:, [-1]], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class ListCache(Core):
    """A cache that is a list of tensors, given and returned beside the logits."""

    def forward(self, tokens: Tensor, cache: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        return self.compute(tokens), [*(cache or []), tokens]


class Wrapped(nn.Module):
    """A wrapper that hides the signature."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DictOut()

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


KINDS = [TensorOut, UnknownName, TupleOut, DictOut, DataclassOut, NamedTupleOut, NanoGPT, ListCache, Wrapped]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_logits_are_found(kind: type[nn.Module]) -> None:
    specimen = Subject(kind).open()
    ids = specimen.probe_ids(3, 7)
    assert specimen.vocab_size == VOCAB
    assert specimen.logits(ids).shape == (3, 7, VOCAB)
    assert specimen.logits(ids[:1, :1]).shape == (1, 1, VOCAB)


@pytest.mark.parametrize(
    ("kind", "capability", "ok"),
    [
        (TensorOut, "mask", False),
        (TensorOut, "cache", False),
        (ListCache, "cache", True),
        (NanoGPT, "labels", True),
        (TensorOut, "labels", False),
        (TensorOut, "gen", False),
        (TensorOut, "rebuild", True),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_capabilities_are_probed(kind: type[nn.Module], capability: str, ok: bool) -> None:
    answer = Subject(kind).open().can(capability)
    assert answer.ok is ok
    assert ok or answer.reason


def test_targets_are_not_shifted_and_labels_are() -> None:
    assert Subject(NanoGPT).open().convention.labels_shifted is False


def test_subjects_own_call_settles_it() -> None:
    class TimeFirst(Core):
        def forward(self, x: Tensor) -> Tensor:
            return self.compute(x).transpose(0, 1)

    with pytest.raises(BuildError, match="time comes first"):
        Subject(TimeFirst).open()
    specimen = Subject(TimeFirst, call=lambda model, input_ids: model(input_ids).transpose(0, 1)).open()
    assert specimen.logits(specimen.probe_ids()).shape == (2, 5, VOCAB)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda logits: "text", r"returned str: no logits in it"),
        (lambda logits: logits.argmax(-1), r"not floating"),
        (lambda logits: logits[:, -1:], r"logits of the last position only"),
        (lambda logits: logits[..., 0], r"expected \[2, 5, vocab\]"),
        (lambda logits: {"last_hidden_state": logits}, r"load it with AutoModelForCausalLM"),
    ],
    ids=["text", "ids", "last-position", "no-vocab", "headless"],
)
def test_failure_says_what_was_tried_and_how_to_adapt(answer: object, says: str) -> None:
    class Odd(Core):
        def forward(self, x: Tensor) -> object:
            return answer(self.compute(x))  # type: ignore[operator]

    with pytest.raises(BuildError, match=says) as caught:
        Subject(Odd).open()
    assert "def call(model, input_ids" in str(caught.value)
    assert "lmconform.Subject" in str(caught.value)


def test_the_users_own_module_is_left_alone() -> None:
    model = TensorOut().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Subject(model).open(seed=3)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Meddler(TensorOut):
    """Leaves torch's global state changed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        return super().forward(x)


@pytest.mark.parametrize("kind", [TensorOut, Meddler])
def test_global_state_of_the_caller_is_left_alone(kind: type[nn.Module]) -> None:
    state = torch.random.get_rng_state()
    Subject(kind).open(seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


class StartPos(Core):
    """Meta's: the first position is required."""

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        assert start_pos == 0
        return self.compute(tokens)


class Mixing(Core):
    def compute(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).cumsum(1))


class RequiredInputs(Mixing):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: object = None) -> Tensor:
        assert attention_mask.shape == input_ids.shape
        return self.compute(input_ids) + 0 * position_ids[..., None]


class RequiredBoolMask(Mixing):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if attention_mask.dtype != torch.bool:
            raise TypeError("attention_mask must be bool")
        return self.compute(input_ids)


class RequiredState(Core):
    """A recurrent state, None at the start: required by name alone."""

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        hidden = self.embedding(x).cumsum(1) + (0 if state is None else state[0])
        return self.head(hidden), [hidden[:, -1:]]

    def compute(self, ids: Tensor) -> Tensor:
        return self.forward(ids, None)[0]


@pytest.mark.parametrize("kind", [StartPos, RequiredInputs, RequiredBoolMask, RequiredState])
def test_what_forward_requires_is_given(kind: type[Core]) -> None:
    found = Subject(kind).open()
    ids = found.probe_ids(2, 5)
    torch.testing.assert_close(found.logits(ids), found.module.compute(ids))


def test_a_cache_beside_what_is_required_is_not_guessed_at() -> None:
    reason = Subject(RequiredInputs).open().can("cache").reason
    assert "requires attention_mask, position_ids" in reason
    assert "Subject(build, call=...)" in reason


def test_a_required_state_is_a_cache_like_any_other() -> None:
    assert Subject(RequiredState).open().can("cache")


class KeptLoss(Core):
    """llama2.c's: logits come back, and the loss stays on the module."""

    last_loss: Tensor | None = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.compute(tokens)
        if targets is None:
            self.last_loss = None
            return logits[:, [-1]]
        self.last_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits


def test_a_loss_that_stays_on_the_module_is_found_and_does_not_hinder_a_copy() -> None:
    found = Subject(KeptLoss).open()
    ids = found.probe_ids(3, 7)
    output = found.forward(ids, labels=ids, grad=True)
    assert output.loss is not None
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()))
    assert output.loss.requires_grad
    found.copy()  # a tensor with a graph cannot be


class KeptScalars(KeptLoss):
    """Beside the loss: a norm at each call, an accuracy without a gradient, a balancing loss that no label moves."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(tokens, targets)
        self.last_norm, self.aux_loss = logits.norm(), logits.square().mean()
        if targets is not None:
            self.accuracy = (logits.argmax(-1) == targets).float().mean()
        return logits


class KeptNorm(Core):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.compute(tokens)
        self.last_norm = logits.norm()
        return logits


def test_of_many_scalars_on_the_module_the_loss_is_taken_and_no_other() -> None:
    assert Subject(KeptScalars).open().convention.kept_loss == "last_loss"
    assert Subject(KeptNorm).open().convention.kept_loss == ""


def test_a_kept_loss_is_read_off_the_module_inside_a_wrapper() -> None:
    found = Subject(KeptLoss).open()
    wrapper = nn.Module()
    wrapper.module = found.module
    wrapper.forward = found.module.forward
    ids = found.probe_ids(2, 5)
    assert found.convention.run(wrapper, ids, labels=ids).loss is not None
    assert found.convention.run(wrapper, ids).loss is None


class Conditioned(Core):
    """`y` is no label: it is something that the text is conditioned on."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.compute(x) if y is None else self.compute(x) + self.compute(y).mean()


def test_what_is_called_y_and_gives_no_loss_is_no_label() -> None:
    assert "nothing says that it takes labels" in Subject(Conditioned).open().can("labels").reason


class HidesOnes(Core):
    """A required mask in which 1 stands for padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = self.embedding(input_ids) * (1 - attention_mask[..., None])
        return self.head(kept.cumsum(1))


def test_a_required_mask_that_hides_where_it_is_one_is_refused() -> None:
    with pytest.raises(BuildError, match="1 may mean hidden"):
        Subject(HidesOnes).open()


class TensorState(RequiredState):
    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        logits, kept = super().forward(x, None if state is None else [state])
        return logits, kept[0]


def test_a_state_that_is_a_tensor_comes_back() -> None:
    assert Subject(TensorState).open().can("cache")


class Autoregressive(Core):
    """A wrapper for training: the loss of its own input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.compute(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


class CausalMaskRequired(Core):
    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        assert mask.shape == (input_ids.shape[1],) * 2
        return self.compute(input_ids)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Autoregressive, "It gives the loss and no logits, which are what is compared: hand over the model inside."),
        (CausalMaskRequired, "return model(input_ids, mask=...)"),
    ],
)
def test_advice_fits_what_was_seen(kind: type[Core], says: str) -> None:
    with pytest.raises(BuildError) as refused:
        Subject(kind).open()
    assert says in str(refused.value)
    assert "forward(mask, mask)" not in str(refused.value)


class OneSequence(Core):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 1:
            raise ValueError("x must be [time]")
        return self.compute(x)


class TargetsRequired(Core):
    def forward(self, input_seq: Tensor, target_seq: Tensor) -> Tensor:
        return F.cross_entropy(self.compute(input_seq).flatten(0, -2), target_seq.flatten())


def adapter_in(text: str) -> Callable[..., Tensor]:
    """call() of the adapter that an error shows."""
    adapter = text.partition("in an adapter:\n\n")[2]
    code = adapter.partition("subject =")[0].replace("import lmconform, your_module", "import lmconform")
    space: dict = {}
    exec(code, space)
    return space["call"]


def test_what_takes_one_sequence_is_told_how_to_stack_them() -> None:
    with pytest.raises(BuildError) as refused:
        Subject(OneSequence).open()
    text = str(refused.value)
    assert "It takes one sequence [time] at a time." in text
    ids = Subject(OneSequence, call=adapter_in(text)).open().probe_ids(2, 5)
    assert ids.shape == (2, 5)


class WholeChunks(Core):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        assert idx.shape[1] % 16 == 0, "the sequence must be divisible by the chunk size"
        return self.compute(idx), None


class OneLength(Core):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 32
        return self.compute(x)


def test_what_takes_whole_chunks_is_told_how_to_pad() -> None:
    with pytest.raises(BuildError) as refused:
        Subject(WholeChunks).open()
    text = str(refused.value)
    assert "It takes 16 and 32 tokens, not 5, 15 or 17: pad at the end" in text
    report = check_model(Subject(WholeChunks, call=adapter_in(text)), profile="smoke")
    assert report.ok, report.failed


class OwnTokensFirst(Core):
    """As prompt tuning does."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        own = input_ids.new_zeros(len(input_ids), 4)
        return {"logits": self.compute(torch.cat([own, input_ids], dim=1))}


def test_what_puts_tokens_first_is_told_how_to_cut_them_off() -> None:
    with pytest.raises(BuildError) as refused:
        Subject(OwnTokensFirst).open()
    assert "It gives the logits of 4 tokens more than it was given" in str(refused.value)
    report = check_model(Subject(OwnTokensFirst, call=adapter_in(str(refused.value))), profile="smoke")
    assert report.ok, report.failed


def test_what_takes_one_length_is_told_which() -> None:
    with pytest.raises(BuildError) as refused:
        Subject(OneLength).open()
    assert "It takes 32 tokens, not 5, 31 or 33: pad at the end" in str(refused.value)
    ids = torch.arange(6).view(2, 3)
    padded = Subject(OneLength, call=adapter_in(str(refused.value))).open(as_loaded=True)
    assert padded.logits(ids).shape == (2, 3, VOCAB)


def test_what_gives_no_logits_but_a_loss_is_told_so() -> None:
    with pytest.raises(BuildError, match="With target_seq it gives the loss and no logits, which are what is compared"):
        Subject(TargetsRequired).open()
