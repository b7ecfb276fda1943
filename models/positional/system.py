"""The positional system as the command line sees it: an encoding, on the own decoder or grafted onto a base."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from models.positional.config import SIZES, PositionalConfig
from models.positional.grafting import BASES, graft
from models.positional.methods import METHODS
from models.positional.modeling import PositionalForCausalLM
from models.training.errors import UsageError
from models.training.systems import System

NAMED = {"tiny": "tiny", "small": "small", "report": "pythia-2.8b"}


def tiny(method: str = "rope") -> PositionalForCausalLM:
    """The smallest own decoder, with random weights."""
    return PositionalForCausalLM(PositionalConfig.sized("tiny", method)).eval()


def build(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The own decoder, or a base with its encoding taken out and this one put in; a checkpoint of ours as it is."""
    if args.model is None:
        specials = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        size = NAMED[args.size]
        positions = max(args.max_length, SIZES[size]["max_position_embeddings"])
        config = PositionalConfig.sized(
            size, args.pe, vocab_size=len(tokenizer), max_position_embeddings=positions, **specials
        )
        model: Any = PositionalForCausalLM(config)
        if args.pe == "math_adaptive":
            model.read_tokenizer(tokenizer)
        return model
    base = AutoConfig.from_pretrained(args.model)
    if base.model_type.startswith("positional"):
        if base.pe_method != args.pe:
            raise UsageError(f"--pe {args.pe}: {args.model} has been trained with {base.pe_method}")
        return AutoModelForCausalLM.from_pretrained(args.model)
    if base.model_type not in BASES:
        raise UsageError(
            f"--model {args.model}: an encoding can be grafted onto {', '.join(BASES)}, not onto {base.model_type}"
        )
    return graft(args.model, args.pe, tokenizer=tokenizer if args.pe == "math_adaptive" else None)


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("positional")
    group.add_argument("--pe", choices=METHODS, default="rope", help="the position encoding (default rope)")


SYSTEM = System(
    name="positional",
    summary="Six position encodings, on a decoder of our own or grafted onto GPT-2, GPT-NeoX and Llama.",
    sizes={ours: SIZES[theirs] for ours, theirs in NAMED.items()},
    build=build,
    add_arguments=add_arguments,
    lora_keeps=("encoding",),
)
