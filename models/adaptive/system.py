"""The adaptive system as the command line sees it: sizes, options, controller, comparison with GPT-2."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from models.adaptive import AdaptiveConfig, AdaptiveForCausalLM
from models.training import options
from models.training.errors import UsageError
from models.training.systems import Preparation, System

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"n_positions": 128, "n_embd": 32, "n_layer": 4, "n_head": 4},
    "small": {"n_positions": 512, "n_embd": 192, "n_layer": 6, "n_head": 6},
    "report": {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
}
PROBE_BATCHES, PROBE_ROWS = 2, 8


def tiny(*, skips: bool = False, vocab_size: int = 64) -> AdaptiveForCausalLM:
    """The smallest model, with random weights; PAD 0, UNK 1, BOS 2, EOS 3."""
    config = AdaptiveConfig(
        vocab_size=vocab_size, skips=skips, pad_token_id=0, bos_token_id=2, eos_token_id=3, **SIZES["tiny"]
    )
    return AdaptiveForCausalLM(config).eval()


def build(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> AdaptiveForCausalLM:
    """From a GPT-2 or an adaptive checkpoint, else from the sizes."""
    if args.model is None:
        sizes = SIZES[args.size] | {"vocab_size": len(tokenizer)}
        sizes["n_positions"] = max(args.max_length, sizes["n_positions"])
        return AdaptiveForCausalLM(AdaptiveConfig(skips=args.skips, **_specials(tokenizer), **sizes))
    kind = AutoConfig.from_pretrained(args.model).model_type
    if kind == "adaptive":
        if args.skips:
            return AdaptiveForCausalLM.from_pretrained(args.model, skips=True)
        return AdaptiveForCausalLM.from_pretrained(args.model)
    if kind != "gpt2":
        raise UsageError(f"--model {args.model}: adaptive starts from GPT-2 or an adaptive checkpoint, not from {kind}")
    return AdaptiveForCausalLM.from_gpt2(args.model, skips=args.skips)


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("adaptive")
    group.add_argument("--skips", action="store_true", help="U-Net skips, which start at 0")
    group.add_argument(
        "--control-heads", action="store_true", help="close heads that do nothing, regrow, prune at the end"
    )
    group.add_argument(
        "--head-warmup", type=options.not_negative, help="steps before the first look (default: a fifth)"
    )
    group.add_argument("--head-every", type=options.positive, help="steps between looks (a tenth of the run)")
    group.add_argument("--max-closed", type=options.number(0, 1), default=0.5, help="largest share of closed heads")
    group.add_argument("--gate-l1", type=options.number(0), default=0.0, help="L1 penalty on the gates")


def callbacks(args: Namespace, given: Preparation) -> list[Any]:
    """The head controller, where it is wanted, measuring on the first training examples."""
    from models.adaptive.controller import HeadController

    if not args.control_heads:
        if args.gate_l1:
            raise UsageError("--gate-l1 is the controller's: give --control-heads too")
        return []
    if args.use_lora and args.gate_l1:
        raise UsageError("--gate-l1 trains the gates, and --use-lora freezes them")
    steps = args.max_steps or max(1, int(args.epochs * len(given.train) / (args.batch_size * args.accumulation)))
    rows = given.train[: PROBE_BATCHES * PROBE_ROWS]
    probe = [given.collate(rows[start : start + PROBE_ROWS]) for start in range(0, len(rows), PROBE_ROWS)]
    return [
        HeadController(
            probe=probe,
            warmup_steps=args.head_warmup if args.head_warmup is not None else steps // 5,
            every=args.head_every or max(1, steps // 10),
            max_share=args.max_closed,
            l1=args.gate_l1,
        )
    ]


def finish(model: Any, args: Namespace, made: Sequence[Any]) -> dict[str, Any]:
    """Remove what the controller has closed; the record of its looks."""
    total = model.config.n_layer * model.config.n_head
    removed = model.prune_heads() if made else {}
    left = sum(len(model.config.heads_of(layer)) for layer in range(model.config.n_layer))
    return {
        "heads": total, "heads_left": left, "removed": {str(layer): heads for layer, heads in removed.items()},
        "gates": model.gates.detach().cpu().tolist(), "looks": [look for one in made for look in one.history],
    }  # fmt: skip


def add_compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="BASE", help="a GPT-2 checkpoint (default: one of random weights)")
    parser.add_argument("--size", choices=options.SIZES, default="tiny", help="without --model")
    parser.add_argument("--skips", action="store_true")
    parser.add_argument("--batch", type=options.positive, default=4)
    parser.add_argument("--time", type=options.positive, default=64, help="tokens of a row (default 64)")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw RMS and RMS ratio by layer (.png, .svg, .pdf)")
    parser.add_argument("--seed", type=options.not_negative, default=0)


def compare(args: Namespace) -> dict[str, Any]:
    """Logits and hidden states of every layer beside GPT-2's."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from models.adaptive.parity import as_json, compare_hidden_states, plot

    if args.plot and Path(args.plot).exists():
        raise UsageError(f"{args.plot} is there already, and nothing is overwritten")
    torch.manual_seed(args.seed)
    if args.model is None:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=2, eos_token_id=3, **SIZES[args.size]))
        for parameter in base.parameters():  # fresh norms and biases are 1 and 0, which hides much
            parameter.data += 0.05 * torch.randn_like(parameter)
    else:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind != "gpt2":
            raise UsageError(f"--model {args.model}: a checkpoint of type {kind!r} is no GPT-2")
        base = GPT2LMHeadModel.from_pretrained(args.model)
    base = (base.double() if args.float64 else base.float()).eval()
    ours = AdaptiveForCausalLM.from_gpt2(base, skips=args.skips)
    if args.time > base.config.n_positions:
        raise UsageError(f"--time {args.time}: the model has {base.config.n_positions} positions")
    ids = torch.randint(base.config.vocab_size, (args.batch, args.time))
    parity = compare_hidden_states(ours, base, ids)
    print(f"{'layer':>5} {'RMS':>12} {'GPT-2':>12} {'ratio - 1':>12}")
    for layer in parity.layers:
        print(f"{layer.layer:>5} {layer.rms:>12.6f} {layer.reference_rms:>12.6f} {layer.rms_ratio - 1:>12.1e}")
    print(f"logits differ by {parity.logits_difference:.1e}; same likeliest token {parity.same_top_token:.1%}")
    if args.plot:
        plot({"adaptive": parity}, args.plot)
    return as_json(parity)


SYSTEM = System(
    name="adaptive",
    summary="A GPT-2 whose heads can be gated, pruned and regrown.",
    sizes=SIZES,
    build=build,
    add_arguments=add_arguments,
    callbacks=callbacks,
    finish=finish,
    add_compare_arguments=add_compare_arguments,
    compare=compare,
)
