"""contract.mode_kept: generate() leaves train and eval mode as it found them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fixtures.subjects import build
from lmconform import Subject, check_model
from lmconform.registry import get_check
from lmconform.runner import Runner


class Writes(nn.Module):
    """A model with a generate() of its own, which leaves the mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("plain")

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids).logits

    def generate(self, input_ids: Tensor, max_new_tokens: int, top_k: int | None = None) -> Tensor:
        found = self.training
        self.begin()
        for _ in range(max_new_tokens):
            input_ids = torch.cat([input_ids, self(input_ids)[:, -1:].argmax(-1)], dim=1)
        self.end(found)
        return input_ids

    def begin(self) -> None:
        pass

    def end(self, found: bool) -> None:
        pass


class StaysInEval(Writes):
    def begin(self) -> None:
        self.eval()


class PutsBack(StaysInEval):
    def end(self, found: bool) -> None:
        self.train(found)


class EndsInTrain(StaysInEval):
    def end(self, found: bool) -> None:
        self.train()


class Raises(EndsInTrain):
    def begin(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Writes, ""),
        (PutsBack, ""),
        (Raises, ""),
        (StaysInEval, "from train to eval mode"),
        (EndsInTrain, "from eval to train mode"),
    ],
)
def test_generate_keeps_the_mode(kind: type[Writes], says: str) -> None:
    result = Runner(Subject(kind).open(), shrink=False).run(get_check("contract.mode_kept"))
    assert (result.status == "failed") == bool(says), result.message
    assert says in result.message


@pytest.mark.parametrize("kind", [Writes, PutsBack])
@pytest.mark.parametrize("how", [{"case": "mode=generate_train"}, {"profile": "thorough"}], ids=["alone", "thorough"])
def test_the_search_for_a_context_is_not_blamed_on_generate(kind: type[Writes], how: dict[str, str]) -> None:
    assert check_model(kind().eval(), select=["contract.mode_kept"], **how).ok
