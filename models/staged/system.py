"""The staged system as the command line sees it: stages, sizes, and the way from one stage to the next."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from models.staged.config import SIZES, STAGES, StagedConfig
from models.staged.credit import HierarchicalCredit
from models.staged.diagnosis import describe
from models.staged.modeling import StagedForCausalLM
from models.staged.stages import TOLERANCE, GraphClosing, at_stage, jump
from models.training import options
from models.training.errors import UsageError
from models.training.systems import Preparation, System

PARTS = ("MU", "TEMPORAL", "K-1", "graph routing")


def tiny(stage: int = 0, *, full: bool = True, openness: float = 0.0, vocab_size: int = 64) -> StagedForCausalLM:
    """The smallest model with random weights, its graph closed; PAD 0, UNK 1, BOS 2, EOS 3."""
    config = StagedConfig.sized(
        "tiny", stage, use_full_model=full, graph_openness=openness, vocab_size=vocab_size
    )  # fmt: skip
    return StagedForCausalLM(config).eval()


def build(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> StagedForCausalLM:
    """Stage 0 from the sizes; a later stage from a checkpoint of the stage before, whose logits it starts with."""
    if args.model is None:
        if args.stage > 0 and not args.skip_stages:
            raise UsageError(
                f"--stage {args.stage} starts from a checkpoint of stage {args.stage - 1}: give --model, or "
                "--skip-stages to begin with all of its parts at once"
            )
        specials = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        longest = max(args.max_length, SIZES[args.size].get("max_position_embeddings", 0))
        config = StagedConfig.sized(
            args.size, args.stage, use_full_model=args.full_mu, vocab_size=len(tokenizer),
            max_position_embeddings=longest, **specials,
        )  # fmt: skip
        return StagedForCausalLM(config)
    base = AutoConfig.from_pretrained(args.model)
    if base.model_type != "staged":
        raise UsageError(f"--model {args.model}: staged starts from a staged checkpoint, not from {base.model_type}")
    if args.full_mu and not base.use_full_model:
        raise UsageError(f"--full-mu: {args.model} has been trained with a plain embedding")
    if args.stage < base.stage:
        raise UsageError(
            f"--stage {args.stage}: {args.model} is at stage {base.stage}, and what it has learnt there cannot be "
            f"taken out again; start from a checkpoint of stage {args.stage} or before"
        )
    if args.stage > base.stage + 1 and not args.skip_stages:
        raise UsageError(
            f"--stage {args.stage}: {args.model} is at stage {base.stage}; train stage {base.stage + 1} first, or give "
            "--skip-stages"
        )
    before = StagedForCausalLM.from_pretrained(args.model)
    after = at_stage(before, args.stage)
    args.jump = jump(before, after, probe(before))
    print(
        f"stage {base.stage} to {args.stage}: logits move by at most {args.jump:.1e} of their standard deviation "
        f"(allowed {TOLERANCE:.0e})"
    )
    if not args.jump <= TOLERANCE:
        raise UsageError(f"--stage {args.stage}: the switch changes what {args.model} computes; its weights do not fit")
    return after


def probe(model: PreTrainedModel) -> torch.Tensor:
    """Random ids [4, 64 or the context] for measuring a switch."""
    time = min(64, model.config.max_position_embeddings)
    return torch.randint(model.config.vocab_size, (4, time), generator=torch.Generator().manual_seed(0))


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("staged")
    group.add_argument(
        "--stage", type=int, choices=STAGES, default=0, help="0 MU, 1 TEMPORAL, 2 K-1, 3 graph routing (default 0)"
    )
    group.add_argument("--full-mu", action="store_true", help="MU's 8x8 matrix instead of a plain embedding")
    group.add_argument("--skip-stages", action="store_true", help="start a stage without the one before it")
    group.add_argument("--no-credit", action="store_true", help="stages 2 and 3 without K-1, for comparison")
    group.add_argument(
        "--credit-floor", type=options.number(0, 1, above=True), default=0.1,
        help="least share of its gradient that K-1 leaves a layer (default 0.1)",
    )  # fmt: skip
    group.add_argument(
        "--credit-memory", type=options.number(0, 0.9999), default=0.99,
        help="how much of its credit a layer keeps from step to step (default 0.99, 0: each step alone)",
    )  # fmt: skip
    group.add_argument(
        "--graph-steps", type=options.positive, help="steps over which the graph closes (default: half of the run)"
    )


def callbacks(args: Namespace, given: Preparation) -> list[Any]:
    """K-1 from stage 2 on, the closing graph at stage 3."""
    made: list[Any] = []
    if args.stage >= 2 and not args.no_credit:
        made.append(HierarchicalCredit(max_norm=args.max_grad_norm, floor=args.credit_floor, memory=args.credit_memory))
        args.max_grad_norm = 0.0  # the Trainer would clip before K-1 can scale
    if args.stage >= 3:
        steps = args.max_steps or max(1, int(args.epochs * len(given.train) / (args.batch_size * args.accumulation)))
        made.append(GraphClosing(args.graph_steps or max(1, steps // 2)))
    return made


def finish(model: Any, args: Namespace, made: Sequence[Any]) -> dict[str, Any]:
    """What the stage was, the jump at its start, and K-1's last word."""
    credit = next((one for one in made if isinstance(one, HierarchicalCredit)), None)
    return {
        "stage": model.config.stage,
        "parts": list(PARTS[: model.config.stage + 1]),
        "jump": getattr(args, "jump", None),
        "graph_openness": model.config.graph_openness,
        "credit": credit and {
            "factors": credit.last and credit.last.factors,
            "without_gradient": sorted(credit.warned),
            "not_finite": credit.skipped,
        },
    }  # fmt: skip


SYSTEM = System(
    name="staged",
    summary="MU, TEMPORAL, K-1 and graph routing, switched on one stage at a time.",
    sizes=SIZES,
    build=build,
    add_arguments=add_arguments,
    callbacks=callbacks,
    finish=finish,
    describe=describe,
    lora_keeps=("embedding.time", "of_time"),
)
