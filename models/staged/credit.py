"""K-1: hierarchical credit. After backward and before clipping, layers share the gradient out by what they earned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from models.staged.modeling import StagedForCausalLM

Tree = str | tuple["Tree", "Tree"]


def parts(model: StagedForCausalLM) -> dict[str, nn.Module]:
    """The leaves of the tree in the order of the forward, the head together with the norm before it."""
    inner, units = model.model, model.config.units
    found: dict[str, nn.Module] = {"embedding": inner.embedding}
    for unit in inner.blocks[:units]:
        found["MU"] = unit
    found["projector"] = inner.get_submodule("projector")
    found |= {f"operator {index}": block for index, block in enumerate(inner.blocks[units:])}
    found["head"] = nn.ModuleList([inner.final_norm, model.head])
    return found


def staged(model: nn.Module) -> StagedForCausalLM:
    """The staged model itself, out of whatever wraps it (DDP, PEFT, compile). Raises TypeError where it is none."""
    for part in model.modules():
        if isinstance(part, StagedForCausalLM):
            return part
    raise TypeError(f"{type(model).__name__} holds no StagedForCausalLM, so there is no tree of its layers")


def tree(leaves: Sequence[str]) -> Tree:
    """A binary tree over neighbouring leaves, halved from the top: the first half is never the smaller one."""
    if len(leaves) == 1:
        return leaves[0]
    middle = (len(leaves) + 1) // 2
    return tree(leaves[:middle]), tree(leaves[middle:])


def shares(node: Tree, earned: Mapping[str, float]) -> dict[str, float]:
    """The factor of every leaf: on the way down each node takes twice its share of what it and its sibling have earned.

    What a node has earned is the norm over its leaves. Equal siblings keep the factor of their parent, and so do two
    that have nothing.
    """

    def norm(node: Tree) -> float:
        return earned[node] if isinstance(node, str) else math.hypot(*map(norm, node))

    def walk(node: Tree, factor: float) -> Iterator[tuple[str, float]]:
        if isinstance(node, str):
            yield node, factor
            return
        both = [norm(child) for child in node]
        for child, own in zip(node, both):
            yield from walk(child, factor * (2 * own / sum(both) if sum(both) else 1.0))

    return dict(walk(node, 1.0))


@dataclass(frozen=True)
class Credit:
    """One optimizer step: the norm of each part's gradient before K-1, what the part has earned so far, its factor."""

    norms: dict[str, float]
    earned: dict[str, float]
    factors: dict[str, float]

    @property
    def silent(self) -> list[str]:
        """Parts without any gradient."""
        return [name for name, norm in self.norms.items() if norm == 0]


@torch.no_grad()
def share_out(
    groups: Mapping[str, Sequence[nn.Parameter]],
    floor: float,
    earned: Mapping[str, float] | None = None,
    memory: float = 0.0,
) -> Credit | None:
    """Scale the gradients of each group in place by its share; None, and nothing done, where one is not finite.

    `earned` is the running mean of the parts' norms so far, of which `memory` is kept. The norm of the whole gradient
    stays what it was: credit is shared out and not made, and clipping sees what it saw before. Then factors below
    `floor` are lifted to it.
    """
    gradients = {
        name: [parameter.grad for parameter in group if parameter.grad is not None] for name, group in groups.items()
    }
    norms = dict(
        zip(gradients, torch.stack([_norm(group, groups[name]) for name, group in gradients.items()]).tolist())
    )
    if not all(map(math.isfinite, norms.values())):
        return None
    earned = {name: memory * (earned or norms)[name] + (1 - memory) * norm for name, norm in norms.items()}
    factors = shares(tree(list(norms)), earned)
    after = math.hypot(*(factors[name] * norm for name, norm in norms.items()))
    kept = math.hypot(*norms.values()) / after if after else 1.0
    factors = {name: max(floor, kept * factor) for name, factor in factors.items()}
    for name, group in gradients.items():
        if group:
            torch._foreach_mul_(group, factors[name])
    return Credit(norms, earned, factors)


def _norm(gradients: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    return torch.nn.utils.get_total_norm(gradients).float()


@dataclass
class HierarchicalCredit(TrainerCallback):
    """K-1 as a Trainer callback, once an optimizer step, over the accumulated gradients; then it clips.

    The Trainer clips before it calls anybody, so its own clipping must be off: TrainingArguments(max_grad_norm=0), and
    `max_norm` here (0: no clipping). `floor`: every part keeps at least this much of its gradient, however little
    credit it has. `memory`: how much of a part's credit stays from step to step. 0 is each step alone, and an optimizer
    that divides by the gradients' recent size then takes the jitter of the shares for smaller gradients. The credit is
    kept beside every checkpoint, and a run that is resumed finds it there. `last` is the latest step's record, `warned`
    the parts that were seen without a gradient.

    Raises ValueError for settings out of range, for a Trainer that clips, and for trained parameters outside the tree;
    TypeError for another model.
    """

    max_norm: float = 1.0
    floor: float = 0.1
    memory: float = 0.99
    last: Credit | None = None
    skipped: int = 0
    warned: set[str] = field(default_factory=set)
    _groups: dict[str, list[nn.Parameter]] = field(default_factory=dict, repr=False)
    _earned: dict[str, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor={self.floor} is above 0, so that nothing is scaled away, and at most 1")
        if self.max_norm < 0:
            raise ValueError(f"max_norm={self.max_norm} must not be negative")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory={self.memory} is a share, from 0 to below 1")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            raise ValueError(
                f"the Trainer clips (max_grad_norm={args.max_grad_norm:g}) before K-1 can scale: set max_grad_norm=0 "
                "and give the bound to HierarchicalCredit(max_norm=...)"
            )
        model = kwargs["model"]
        self._groups = {
            name: own
            for name, part in parts(staged(model)).items()
            if (own := [parameter for parameter in part.parameters() if parameter.requires_grad])
        }
        known = {id(parameter) for group in self._groups.values() for parameter in group}
        strange = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        if strange:
            raise ValueError(f"trained parameters that belong to no layer of the tree: {', '.join(strange[:5])}")

        kept = _beside_checkpoint(args, state)
        self._earned = json.loads(kept.read_text(encoding="utf-8")) if state.global_step and kept.is_file() else None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _beside_checkpoint(args, state).write_text(json.dumps(self._earned), encoding="utf-8")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None:  # fp16: as the Trainer's own clipping would have done
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        credit = share_out(self._groups, self.floor, self._earned, self.memory)
        if credit is None:  # nothing to share out; a loss scaler leaves the step out, an optimizer shows the NaN
            self.skipped += 1
            return
        self.last, self._earned = credit, credit.earned
        for name in credit.silent:
            if name not in self.warned:
                self.warned.add(name)
                print(f"K-1: no gradient at all in {name} at step {state.global_step}")
        if self.max_norm:
            every = [parameter for group in self._groups.values() for parameter in group]
            torch.nn.utils.clip_grad_norm_(every, self.max_norm)


def _beside_checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "credit.json"
