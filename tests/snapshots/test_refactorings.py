"""A snapshot stays quiet where behaviour is kept: other names, other kernels, another order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.planting import around
from fixtures.subjects import plain
from lmconform import Subject
from lmconform.snapshots import SnapshotError, counting
from lmconform.snapshots.comparison import Comparison, compare
from lmconform.snapshots.taking import observe, take


def fused_attention(model: Any) -> None:
    def forward(original: Any, x: Tensor, positions: Tensor, mask: Any, past: Any) -> Any:
        self = original.args[0]
        q, k = (self.turn(self.split(part(x)), positions) for part in (self.q, self.k))
        k, v = self.extend(past, k, self.split(self.v(x)))
        seen = self.visible(q.shape[2], k.shape[2], mask, x.device)
        mixed = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), attn_mask=seen)
        return self.o(mixed.transpose(1, 2).flatten(-2)), (k, v)

    for block in model.blocks:
        around(block.attention, forward)


def norms_in_float32(model: Any) -> None:
    def forward(original: Any, x: Tensor) -> Tensor:
        norm = original.args[0]
        weight, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)

    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            around(part, forward)


def other_initialisation(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.xavier_uniform_(parameter)


def other_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def registered_backwards(model: Any) -> None:
    for block in model.blocks:
        block._modules = dict(reversed(block._modules.items()))
        block.attention._modules = dict(reversed(block.attention._modules.items()))


@pytest.mark.parametrize(
    ("host", "change"),
    [
        ("plain", lambda model: None),
        ("plain", fused_attention),
        ("plain", norms_in_float32),
        ("plain", other_initialisation),
        ("plain", registered_backwards),
        ("gpt2", other_attention),
        ("llama", other_attention),
        ("mixtral", lambda model: None),
        ("mamba", lambda model: None),
    ],
    ids=["none", "fused-attention", "float32-norms", "initialisation", "order", "gpt2-eager", "llama-eager",
         "experts", "no-float64"],
)  # fmt: skip
def test_kept_behaviour_is_the_same(
    against: Callable[..., Comparison], host: str, change: Callable[[Any], None]
) -> None:
    found = against(host, change)
    assert found.ok, [finding.message for finding in found.findings]


class OtherFeedForward(nn.Module):
    w1: nn.Linear
    w2: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


def renamed(model: Any) -> None:
    for block in model.blocks:
        block.feed_forward._modules = {"w1": block.feed_forward.up, "w2": block.feed_forward.down}
        block.feed_forward.__class__ = OtherFeedForward


def test_renaming_is_an_inventory_change_and_no_other(against: Callable[..., Comparison]) -> None:
    found = against("plain", renamed)
    assert [finding.kind for finding in found.findings] == ["inventory"]
    assert "blocks.0.feed_forward.up.weight -> blocks.0.feed_forward.w1.weight" in found.findings[0].message
    assert against("plain", renamed, ignored=("inventory",)).ok


def test_fault_under_new_names_is_found_all_the_same(against: Callable[..., Comparison]) -> None:
    def faulty(model: Any) -> None:
        renamed(model)
        model.norm.eps = 1e-6

    found = against("plain", faulty, ignored=("inventory",))
    assert [finding.kind for finding in found.counted] == ["behaviour"]


def test_dtype_and_buffers_are_inventory(against: Callable[..., Comparison]) -> None:
    def change(model: Any) -> None:
        model.register_buffer("extra", torch.zeros(3), persistent=False)
        model.blocks[0].attention.register_parameter("bonus", nn.Parameter(torch.zeros(2)))

    messages = [finding.message for finding in against("plain", change).findings]
    assert "1 parameter new: blocks.0.attention.bonus (float32 [2])" in messages
    assert "1 buffer new: extra (float32 [3], not saved)" in messages


# -- the same every time -----------------------------------------------------------------------------------------------


def test_numbers_come_from_counters_alone() -> None:
    """Known values: these must never change, or every snapshot there is becomes worthless."""
    assert counting.stream("weights", 0, 0) == 10631048588682640308
    assert counting.words(0, 3).tolist() == [16294208416658607535, 7960286522194355700, 487617019471545679]
    assert counting.below(7, 5, 99).tolist() == counting.below(7, 9, 99).tolist()[:5]
    drawn = counting.normals(5, 1 << 16)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.01


def test_same_subject_gives_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file in files:
        snapshot = take(Subject(plain, name="plain"))
        snapshot.speed = {}
        snapshot.write(file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_loss_without_a_number_is_left_out_and_stays_out() -> None:
    def endless() -> nn.Module:
        def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            output.loss = None if output.loss is None else output.loss * float("nan")
            return output

        model = plain()
        around(model, forward)
        return model

    snapshot = take(Subject(endless, name="endless"))
    assert snapshot.behaviour.missing == {"loss": "gives NaN or infinity"}
    assert compare(snapshot, observe(Subject(endless, name="endless"), snapshot)).ok
    now = compare(snapshot, observe(Subject(plain, name="plain"), snapshot))
    assert [finding.message for finding in now.findings] == [
        "loss: the subject can do it now, the snapshot does not hold it: renew it"
    ]


def test_subject_that_rolls_dice_is_refused() -> None:
    class Dice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain()

        def forward(self, input_ids: Tensor) -> Tensor:
            return F.dropout(self.inner(input_ids).logits, 0.1)

    with pytest.raises(SnapshotError, match="two equal calls give different"):
        take(Subject(Dice, name="dice"))
