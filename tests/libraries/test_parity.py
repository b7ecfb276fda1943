"""Models of transformers carried over into other libraries: sound ports are green, each wrong transfer is named.

The ports into litgpt and TransformerLens run where those are installed; models in their style always do.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from fixtures.subjects import ported
from fixtures.subjects.ported import HEADS, Fault, Weights
from lmconform import Subject
from lmconform.measuring.pairing import pair_parameters
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

CHECKS = ("parity.logits", "parity.hidden", "parity.gradients", "parity.scale", "parity.transfer")


def before_4() -> bool:
    if find_spec("transformer_lens") is None:
        return False
    from importlib.metadata import version

    return int(version("transformer-lens").partition(".")[0]) < 4


LITGPT = pytest.mark.skipif(find_spec("litgpt") is None, reason="litgpt is not installed")
LENS = pytest.mark.skipif(not before_4(), reason="TransformerLens before 4 is not installed")
PORTS: dict[str, tuple[Any, Any, Any]] = {
    "layer_caches": (ported.layer_caches, ported.gpt_neox, ()),
    "head_weights": (ported.head_weights, ported.gpt2, ()),
    "litgpt_neox": (ported.litgpt_neox, partial(ported.gpt_neox, rotated=0.5), LITGPT),
    "litgpt_llama": (ported.litgpt_llama, ported.llama, LITGPT),
    "hooked_gpt2": (ported.hooked_gpt2, ported.gpt2, LENS),
}


def verdict(port: str, check: str, fault: Fault | None = None) -> Result:
    build, original, _ = PORTS[port]
    specimen = Subject(lambda: build(fault), name=port).open()
    specimen.reference = Subject(original, name="transformers").open(as_loaded=True)
    return Runner(specimen, shrink=False).run(get_check(check))


def of(port: str, *values: Any) -> Any:
    return pytest.param(port, *values, marks=PORTS[port][2])


def exchanged(one: str, other: str, weights: Weights) -> None:
    weights[one], weights[other] = weights[other], weights[one]


def forgotten(name: str, weights: Weights) -> None:
    fresh = nn.Linear(*reversed(weights[name].shape), bias=False)
    weights[name] = fresh.weight.detach()


def transposed(name: str, weights: Weights) -> None:
    weights[name] = weights[name].T.contiguous()


def rows_exchanged(name: str, one: slice, other: slice, weights: Weights) -> None:
    rows = weights[name]
    rows[one], rows[other] = rows[other].clone(), rows[one].clone()


def heads_last(name: str, weights: Weights) -> None:
    """[heads, size, width], made as if the heads were the last part of the rows and not the first."""
    whole = weights[name].flatten(0, 1)
    weights[name] = whole.unflatten(0, (-1, HEADS)).transpose(0, 1).contiguous()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("port", [of(name) for name in PORTS])
def test_sound_port_is_green(port: str, check: str) -> None:
    result = verdict(port, check)
    assert result.status == "passed", result.message
    assert result.margin is not None
    assert result.margin < 0.5


def test_a_small_part_of_a_fused_matrix_is_found() -> None:
    """Keys of grouped attention are less than half of what they are fused into."""
    parts = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 4), "v": nn.Linear(8, 4)})
    fused = nn.Linear(8, 16)
    fused.weight.data = torch.cat([part.weight.data for part in parts.values()])
    fused.bias.data = torch.cat([part.bias.data for part in parts.values()])
    pairs = {pair.reference: pair for pair in pair_parameters(fused, parts)}
    assert {name: pair.found for name, pair in pairs.items()} == dict.fromkeys(pairs, 1.0)
    for name, rows in (("k", range(8, 12)), ("v", range(12, 16))):
        for leaf in ("weight", "bias"):
            (link,) = pairs[f"{name}.{leaf}"].links
            assert (link.index >= 0).nonzero().flatten().tolist() == list(rows)


KEYS, VALUES = slice(48, 96), slice(96, 144)
BLOCK = "transformer.h.1"


@pytest.mark.parametrize(
    ("port", "fault", "hidden", "transfer"),
    [
        of(
            "layer_caches", partial(rows_exchanged, f"{BLOCK}.attn.qkv.weight", KEYS, VALUES),
            f"{BLOCK}.attn.qkv takes an input that the reference has too",
            f"gpt_neox.layers.1.attention.query_key_value.bias of the reference is not what {BLOCK}.attn.qkv.bias",
        ),
        of(
            "layer_caches", partial(transposed, f"{BLOCK}.attn.proj.weight"),
            f"{BLOCK}.attn.proj takes an input that the reference has too",
            f"with {BLOCK}.attn.proj.weight transposed, the logits equal",
        ),
        of(
            "layer_caches", partial(exchanged, f"{BLOCK}.norm_1.weight", f"{BLOCK}.norm_2.weight"),
            f"{BLOCK}.norm_1 takes an input that the reference has too",
            f"{BLOCK}.norm_2.weight and {BLOCK}.norm_1.weight with one another's numbers, the logits equal",
        ),
        of(
            "layer_caches", partial(forgotten, "transformer.h.0.mlp.0.weight"),
            "transformer.h.0.mlp.0 takes an input that the reference has too",
            "transformer.h.0.mlp.0.weight holds numbers from elsewhere",
        ),
        of(
            "head_weights", partial(exchanged, "blocks.1.attn.W_Q", "blocks.1.attn.W_K"),
            "what goes into blocks.1.attn.hook_q is found nowhere",
            "blocks.1.attn.W_K and blocks.1.attn.W_Q with one another's numbers, the logits equal",
        ),
        of(
            "head_weights", partial(heads_last, "blocks.1.attn.W_O"),
            "blocks.1.attn.hook_v before it gives the channels of the reference in another order",
            "blocks.1.attn.W_O with its numbers in the reference's order, the logits equal",
        ),
        of(
            "litgpt_neox", partial(transposed, f"{BLOCK}.attn.proj.weight"),
            f"{BLOCK}.attn.proj takes an input that the reference has too",
            f"with {BLOCK}.attn.proj.weight transposed, the logits equal",
        ),
        of(
            "litgpt_llama", partial(rows_exchanged, f"{BLOCK}.attn.qkv.weight", slice(48, 72), slice(72, 96)),
            f"{BLOCK}.attn.qkv before it gives the channels of the reference in another order",
            f"rows 48 to 71 of {BLOCK}.attn.qkv.weight",
        ),
        of(
            "litgpt_llama", partial(exchanged, f"{BLOCK}.mlp.fc_1.weight", f"{BLOCK}.mlp.fc_2.weight"),
            f"what goes into {BLOCK}.mlp.proj is found nowhere",
            f"{BLOCK}.mlp.fc_2.weight and {BLOCK}.mlp.fc_1.weight with one another's numbers, the logits equal",
        ),
        of(
            "hooked_gpt2", partial(exchanged, "blocks.1.attn.W_Q", "blocks.1.attn.W_K"),
            "what goes into blocks.1.attn.hook_q is found nowhere",
            "blocks.1.attn.W_K and blocks.1.attn.W_Q with one another's numbers, the logits equal",
        ),
        of(  # its hook_z is the reference's input of the projection
            "hooked_gpt2", partial(heads_last, "blocks.1.attn.W_O"),
            "blocks.1.attn takes an input that the reference has too",
            "blocks.1.attn.W_O with its numbers in the reference's order, the logits equal",
        ),
    ],
    ids=[
        "keys_and_values", "untransposed", "norms", "forgotten", "queries_and_keys", "heads_last",
        "litgpt_untransposed", "litgpt_keys_and_values", "litgpt_gate_and_up", "lens_queries_and_keys",
        "lens_heads_last",
    ],
)  # fmt: skip
def test_wrong_transfer_is_named(port: str, fault: Fault, hidden: str, transfer: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for check, says in (("parity.hidden", hidden), ("parity.transfer", transfer)):
            result = verdict(port, check, fault)
            assert result.status == "failed"
            assert says in result.message
