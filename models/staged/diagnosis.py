"""The report's own diagnosis beside the suite: parameters, gradient flow, memorisation, generation."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from models.staged.credit import parts
from models.staged.modeling import StagedForCausalLM

SENTENCE = "The capital of India is New Delhi, and the river that runs through it is the Yamuna."
STEPS, RATE = 100, 0.15  # the rate is this over the width: wider models take lower ones
GOAL = 0.1
FLOWS = 1e-4  # of the strongest part's gradient


def describe(model: StagedForCausalLM, tokenizer: Any = None) -> str:
    """Four short tables of a model and its tokenizer; without one the sentence is of random tokens.

    The model is left as it was. Costs 100 training steps on one sentence, on a copy.
    """
    if tokenizer is None:
        ids = torch.randint(4, model.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.tensor([tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]])
    ids = ids.to(model.device)
    stage = f"stage {model.config.stage}, {'MU' if model.config.use_full_model else 'plain embedding'}"
    if model.config.stage == 3:
        stage += f", graph open by {model.config.graph_openness:.0%}"
    pupil, untaught = copy.deepcopy(model), copy.deepcopy(model)
    written = {"the sentence": ids[0]}
    lines = [stage, *_parts(pupil, ids), *_memorisation(pupil, ids)]
    written["as the model goes on"] = _generated(untaught, ids)
    written["having memorised it"] = _generated(pupil, ids)
    for name, made in written.items():
        text = tokenizer.decode(made) if tokenizer is not None else " ".join(map(str, made.tolist()))
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


def _parts(model: StagedForCausalLM, ids: Tensor) -> list[str]:
    model.train()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    rows = []
    for name, part in parts(model).items():
        norm = math.hypot(*(float(p.grad.norm()) for p in part.parameters() if p.grad is not None), 0.0)
        rows.append((name, sum(p.numel() for p in part.parameters()), norm))
    strongest = max(norm for *_, norm in rows)
    lines = [f"{'':12} {'parameters':>12} {'gradient':>10}"]
    for name, count, norm in rows:
        told = "" if norm > FLOWS * strongest else "  no gradient" if norm == 0 else "  vanishing"
        lines.append(f"{name:12} {count:>12,} {norm:>10.3g}{told if math.isfinite(norm) else '  not finite'}")
    return [*lines, f"{'all':12} {sum(count for _, count, _ in rows):>12,}"]


def _memorisation(pupil: StagedForCausalLM, ids: Tensor) -> list[str]:
    pupil.train()
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=RATE / pupil.config.hidden_size, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = pupil(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    below = next((step for step, loss in enumerate(losses) if loss < GOAL), None)
    told = f"below {GOAL} after {below} steps" if below is not None else f"NOT below {GOAL}"
    return [f"one sentence: loss {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps, {told}"]


def _generated(model: StagedForCausalLM, ids: Tensor) -> Tensor:
    """The beginning of ids [1, time], and what the model makes of it, greedily."""
    given = ids[:, : max(1, ids.shape[1] // 4)]
    made: Tensor = model.eval().generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=ids.shape[1] - given.shape[1], do_sample=False,
        pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    return made[0]
