"""The quantum system as the command line sees it: sizes, tokenizer, losses, samples, comparison with the definition."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from models.quantum import QuantumConfig, QuantumForCausalLM
from models.training import options
from models.training.errors import UsageError
from models.training.systems import Loss, System
from models.training.words import word_level

SIZES: dict[str, dict[str, Any]] = {
    # under 100k parameters: tests
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    # 2 M with 8192 words
    "small": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512},
    # the report's: 64 complex dimensions, 8192 words
    "report": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": 512},
}
VOCABULARY = 8192
SLACK = 16.0  # of compare's bound; float64 was seen at 0.6 to 1.3 times the float32 difference scaled down


def tiny(*, interference: bool = False, vocab_size: int = 64) -> QuantumForCausalLM:
    """The smallest model, with random weights; PAD 0, UNK 1, BOS 2, EOS 3."""
    return QuantumForCausalLM(QuantumConfig(vocab_size=vocab_size, interference=interference, **SIZES["tiny"])).eval()


def build(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> QuantumForCausalLM:
    """From a quantum checkpoint, else from the sizes. The special tokens' ids are `fit_vocabulary`'s business."""
    if args.model is None:
        sizes = SIZES[args.size] | {"vocab_size": len(tokenizer)}
        sizes["max_position_embeddings"] = max(args.max_length, sizes["max_position_embeddings"])
        return QuantumForCausalLM(QuantumConfig(interference=args.interference, **sizes))
    config = AutoConfig.from_pretrained(args.model)
    if config.model_type != "quantum":
        raise UsageError(
            f"--model {args.model}: quantum goes on from its own checkpoints, not from {config.model_type}"
        )
    if args.interference and not config.interference:
        raise UsageError(
            f"--interference: {args.model} has been built without it, and its layers cannot be added later"
        )
    return QuantumForCausalLM.from_pretrained(args.model)


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("quantum")
    group.add_argument("--interference", action="store_true", help="the phase-space interference layer in every block")
    group.add_argument(
        "--balance", type=options.number(0), default=0.0, metavar="W",
        help="weight of the divergence of the mean prediction from the labels' shares (default 0)",
    )  # fmt: skip
    group.add_argument(
        "--eos-weight", type=options.number(0), default=1.0, metavar="W", help="of EOS in the loss (default 1)"
    )


def loss(args: Namespace) -> Loss | None:
    """The balanced loss where an option asks for it, else the model's own."""
    from models.training.balance import BalancedLoss

    if not args.balance and args.eos_weight == 1:
        return None
    config: Any = QuantumConfig() if args.model is None else AutoConfig.from_pretrained(args.model)
    return BalancedLoss(
        balance=args.balance, eos_weight=args.eos_weight, eos_token_id=config.eos_token_id,
        label_smoothing=args.label_smoothing,
    )  # fmt: skip


def add_compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="CHECKPOINT", help="a quantum checkpoint (default: one of random weights)")
    parser.add_argument("--size", choices=options.SIZES, default="tiny", help="without --model")
    parser.add_argument("--interference", action="store_true", help="without --model")
    parser.add_argument("--batch", type=options.positive, default=4)
    parser.add_argument("--time", type=options.positive, default=64, help="tokens of a row (default 64)")
    parser.add_argument("--seed", type=options.not_negative, default=0)


def compare(args: Namespace) -> dict[str, Any]:
    """Logits and states after every block, in float32 and float64, beside the same computed with complex numbers.

    `agrees` says whether all of them are as near as rounding in float64 allows.
    """
    import torch

    from models.quantum.reference import complex_forward, parts

    torch.manual_seed(args.seed)
    if args.model is None:
        model: Any = QuantumForCausalLM(
            QuantumConfig(vocab_size=256, interference=args.interference, **SIZES[args.size])
        )
        for parameter in model.parameters():  # fresh norms and biases are 1 and 0, which hides much
            parameter.data += 0.05 * torch.randn_like(parameter)
    else:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind != "quantum":
            raise UsageError(f"--model {args.model}: a checkpoint of type {kind!r} is no quantum model")
        model = QuantumForCausalLM.from_pretrained(args.model)
    if args.time > model.config.max_position_embeddings:
        raise UsageError(f"--time {args.time}: the model has {model.config.max_position_embeddings} positions")
    ids = torch.randint(model.config.vocab_size, (args.batch, args.time))
    try:
        logits, states = complex_forward(model, ids)
    except ValueError as error:
        raise UsageError(f"--model {args.model}: {error}") from error
    found = {}
    for dtype in (torch.float64, torch.float32):  # narrower last: what it rounds off does not come back
        with torch.no_grad():
            found[dtype] = model.to(dtype).eval()(ids, output_hidden_states=True)
    figures: dict[str, Any] = {"parameters": model.num_parameters(), "layers": []}
    print(f"{'state':>9} {'RMS':>9} {'float32':>9} {'float64':>9} {'allowed':>9}")
    # the last state that transformers gives stands behind the final norm
    for index, state in enumerate(states[:-1]):
        wanted = parts(state)
        rms = float(wanted.square().mean().sqrt())
        apart = _apart({str(dtype)[6:]: output.hidden_states[index] for dtype, output in found.items()}, wanted)
        figures["layers"].append({"rms": rms, **apart})
        print(f"{index:>9} {rms:>9.3f} {apart['float32']:>9.1e} {apart['float64']:>9.1e} {apart['allowed']:>9.1e}")
    figures["logits"] = apart = _apart({str(dtype)[6:]: output.logits for dtype, output in found.items()}, logits)
    print(f"{'logits':>19} {apart['float32']:>9.1e} {apart['float64']:>9.1e} {apart['allowed']:>9.1e}")
    figures["agrees"] = all(one["float64"] <= one["allowed"] for one in (*figures["layers"], apart))
    if not figures["agrees"]:
        print("float64 differs by more than rounding: the model does not compute its definition")
    return figures


def _apart(actual: Mapping[str, Any], wanted: Any) -> dict[str, float]:
    """The largest differences by type, and what rounding allows in float64.

    A difference of rounding shrinks with the type's epsilon, a difference of definition stays: from float32 to float64
    what is seen must fall by 2^-29, up to SLACK, since the two round other numbers and the definition rounds too.
    """
    found = {name: float((values.double() - wanted).abs().max()) for name, values in actual.items()}
    return {**found, "allowed": SLACK * 2.0**-29 * found["float32"]}


SYSTEM = System(
    name="quantum",
    summary="Complex states (amplitude and phase), attention by Re(q conj k), losses and monitors for collapse.",
    sizes=SIZES,
    build=build,
    tokenizer=word_level,
    add_arguments=add_arguments,
    defaults={"vocab_size": VOCABULARY},
    loss=loss,
    add_compare_arguments=add_compare_arguments,
    compare=compare,
)
