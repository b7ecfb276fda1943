"""Snapshots taken in one environment and compared in another: other torch, other transformers, other processor.

    python -m tests.snapshots.elsewhere take FOLDER [HOST ...]
    python -m tests.snapshots.elsewhere compare FOLDER [HOST ...]

The second compares every snapshot in FOLDER (or those of the hosts named) with the sound host and with each slip, and
prints one line of JSON a comparison. Random numbers of torch play no part: weights are lmconform's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.planting import around
from fixtures.subjects import SOUND, build
from lmconform import Subject
from lmconform.snapshots import store
from lmconform.snapshots.comparison import allowed, compare
from lmconform.snapshots.fingerprint import Figures
from lmconform.snapshots.names import SUFFIX
from lmconform.snapshots.taking import Observed, observe, take


def _story() -> nn.Module:
    from models.story.system import tiny

    return tiny()


def _quantum() -> nn.Module:
    from models.quantum.system import tiny

    return tiny(interference=True)


def _staged() -> nn.Module:
    from models.staged.system import tiny

    return tiny(2)


def _adaptive() -> nn.Module:
    from models.adaptive.system import tiny

    return tiny(skips=True)


OWN = {"story": _story, "quantum": _quantum, "staged": _staged, "adaptive": _adaptive}
HOSTS = ("gpt2", "llama", "gpt_neox", "bloom", "mpt", "plain", *OWN)


def subject_of(host: str, plant: Callable[[Any], None] | None = None) -> Subject:
    """The sound host, or the host with a slip planted."""

    def built() -> nn.Module:
        model = OWN[host]() if host in OWN else build(host, torch.initial_seed() % (1 << 31))
        if plant is not None:
            plant(model)
        return model

    assert host in OWN or host in SOUND, host
    return Subject(built, name=host)


# -- slips -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Where a host keeps what the slips change: names of modules, and how many heads attention has."""

    activation: str
    norm: str
    output: str  # of attention, whose input is all heads side by side
    heads: int
    given_positions: bool
    head: str = "lm_head"


PARTS = {
    "gpt2": Parts("transformer.h.1.mlp.act", "transformer.h.1.ln_2", "transformer.h.1.attn.c_proj", 4, True),
    "llama": Parts("", "model.layers.1.post_attention_layernorm", "model.layers.1.self_attn.o_proj", 4, True),
    "gpt_neox": Parts(
        "gpt_neox.layers.1.mlp.act", "gpt_neox.layers.1.input_layernorm", "gpt_neox.layers.1.attention.dense", 4, True
    ),
    "bloom": Parts(
        "transformer.h.1.mlp.gelu_impl", "transformer.h.1.post_attention_layernorm",
        "transformer.h.1.self_attention.dense", 4, False,
    ),
    "mpt": Parts(
        "transformer.blocks.1.ffn.act", "transformer.blocks.1.norm_2", "transformer.blocks.1.attn.out_proj", 4, False
    ),
    "plain": Parts("", "blocks.1.feed_forward_norm", "blocks.1.attention.o", 4, False, "head"),
}  # fmt: skip


def other_gelu(original: Any, x: Tensor) -> Tensor:
    """The tanh approximation for the exact function, and the other way round."""
    given, exact, approximate = original(x), F.gelu(x), F.gelu(x, approximate="tanh")
    return approximate if (given - exact).abs().sum() < (given - approximate).abs().sum() else exact


def other_epsilon(norm: Any) -> None:
    """1e-6 for 1e-5, and the other way round."""
    name = next(name for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    setattr(norm, name, 1e-6 if getattr(norm, name) == 1e-5 else 1e-5)


def one_head_larger(heads: int, original: Any, x: Tensor) -> Tensor:
    """The last head but one is a thousandth too large."""
    factor = x.new_ones(heads)
    factor[-2] = 1.001
    return original((x.unflatten(-1, (heads, -1)) * factor[:, None]).flatten(-2))


def two_heads_swapped(heads: int, original: Any, x: Tensor) -> Tensor:
    order = [*range(heads - 2), heads - 1, heads - 2]
    return original(x.unflatten(-1, (heads, -1))[..., order, :].flatten(-2))


def one_step_late(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Cached steps count their positions from one too many."""
    cache = kwargs.get("past_key_values")
    if cache is not None and (past := cache.get_seq_length()):
        ids = kwargs["input_ids"]
        kwargs["position_ids"] = torch.arange(past + 1, past + 1 + ids.shape[1]).expand(ids.shape)
    return original(*args, **kwargs)


def slips_of(host: str) -> dict[str, Callable[[Any], None]]:
    """Each changes a built host a little; a host without the part in question has no such slip."""
    if host not in PARTS:
        return {}
    parts = PARTS[host]

    def at(name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
        return lambda model: around(model.get_submodule(name), change)

    slips = {
        "epsilon": lambda model: other_epsilon(model.get_submodule(parts.norm)),
        "head-scaled": at(parts.output, functools.partial(one_head_larger, parts.heads)),
        "heads-swapped": at(parts.output, functools.partial(two_heads_swapped, parts.heads)),
        "detached": at(parts.output, lambda original, x: original(x.detach())),
        "temperature": at(parts.head, lambda original, x: original(x) * 0.999),
    }
    if parts.activation:
        slips["gelu"] = at(parts.activation, other_gelu)
    if parts.given_positions:
        slips["step-late"] = lambda model: around(model, one_step_late)
    return slips


# -- taking and comparing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One comparison. Vectors are rows of a key; `moved` counts those that are not the same to the bit, `told` those
    beyond float64's own rounding, `nearest` is the largest share of its bound that any reached, at `key`."""

    host: str
    slip: str
    ok: bool
    vectors: int
    moved: int
    told: int
    nearest: float
    key: str
    where: str
    kinds: list[str]
    taken: str
    now: str


def _moved(figures: Figures, current: Any) -> tuple[int, int]:
    difference = np.nan_to_num(np.abs(current - figures.values)).max(-1)
    return int((difference > 0).sum()), int((difference > allowed(figures)[0]).sum())


def circumstances(provenance: dict[str, Any]) -> str:
    return ", ".join(f"{name} {provenance[name]}" for name in ("torch", "transformers", "python", "machine", "threads"))


def outcome(host: str, slip: str, snapshot: store.Snapshot, now: Observed) -> Outcome:
    found = compare(snapshot, now)
    keys = snapshot.behaviour.keys
    counts = [_moved(keys[move.key], now.measured.figures[move.key]) for move in found.moves]
    worst = max(found.moves, key=lambda move: move.times)
    moved, told = (sum(column) for column in zip(*counts, strict=True))
    return Outcome(
        host, slip, found.ok, sum(move.total for move in found.moves), moved, told, worst.times, worst.key,
        next((finding.where for finding in found.findings), ""), [finding.kind for finding in found.findings],
        circumstances(snapshot.provenance), circumstances(now.provenance),
    )  # fmt: skip


def outcomes(folder: Path, hosts: list[str]) -> Iterator[Outcome]:
    """Every snapshot in the folder against its host, sound and with each slip."""
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        host = file.name.removesuffix(SUFFIX)
        if hosts and host not in hosts:
            continue
        snapshot = store.read(file)
        for slip, plant in {"": None, **slips_of(host)}.items():
            yield outcome(host, slip, snapshot, observe(subject_of(host, plant), snapshot))


def main(arguments: list[str]) -> None:
    command, folder, *hosts = arguments
    if command == "take":
        for host in hosts or HOSTS:
            take(subject_of(host)).write(Path(folder) / f"{host}{SUFFIX}")
    elif command == "compare":
        for found in outcomes(Path(folder), hosts):
            print(json.dumps(dataclasses.asdict(found)), flush=True)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
