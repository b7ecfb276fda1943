"""The story system as the command line sees it: sizes, two phases, tokenizers, and what a comparison may vary."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from models.story import StoryConfig, StoryForCausalLM
from models.training import options
from models.training.errors import UsageError
from models.training.systems import System, own_config, training_options
from models.training.words import word_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 512},
    "report": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 512},
}
FIRST: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_steps": 0.05}
SECOND: dict[str, Any] = {
    "learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_steps": 0.05, "label_smoothing": 0.1, "accumulation": 2,
    "adam_beta2": 0.98, "weight_decay": 0.01,
}  # fmt: skip


def tiny(**fields: Any) -> StoryForCausalLM:
    """The smallest model, with random weights; `fields` are StoryConfig's. PAD 0, UNK 1, BOS 2, EOS 3."""
    return StoryForCausalLM(StoryConfig(**{**SIZES["tiny"], **fields})).eval()


def build(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> StoryForCausalLM:
    """From the sizes, or a story checkpoint."""
    if args.model is None:
        sizes = SIZES[args.size] | {"vocab_size": len(tokenizer)}
        sizes["max_position_embeddings"] = max(args.max_length, sizes["max_position_embeddings"])
        if args.width is not None:
            sizes["hidden_size"] = args.width
        try:
            config = StoryConfig(attention=args.attention, norm_placement=args.norm_placement, **sizes)
        except StrictDataclassError as error:  # what it wraps says it in one line
            option = f"--size {args.size}" if args.width is None else f"--width {args.width}"
            raise UsageError(f"{option}: {error.__cause__ or error}") from error
        return StoryForCausalLM(config)
    own_config(args.model, "story")
    found: StoryForCausalLM = StoryForCausalLM.from_pretrained(args.model)
    return found


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("story")
    group.add_argument("--attention", choices=("causal", "bidirectional"), default="causal", help="the second leaks")
    group.add_argument("--norm-placement", choices=("pre", "post"), default="pre", help="the report's was post")
    group.add_argument("--width", type=options.positive, help="another hidden size than that of --size")


def add_compare_arguments(parser: ArgumentParser) -> None:
    parser.description = "Arms of one comparison, trained alike. All other options are those of `train story`."
    parser.add_argument("--vary", choices=tuple(VARIED), default="phase", help="what the arms differ in (phase)")
    parser.add_argument("--values", metavar="A,B", help="its values, the first being the base of the differences")
    parser.add_argument("--seeds", type=options.positive, default=3, help="runs of each arm (default 3)")
    parser.add_argument("--tokens", type=options.positive, default=102_400, help="read by each arm (default 102400)")
    parser.add_argument("--prompt", default="once upon a time", help="what every arm goes on with at the end")


def compare(args: Namespace) -> dict[str, Any]:
    """Arms that differ in one thing, over seeds; prints the table."""
    from models.training.comparison import compare, table

    usual, arguments = VARIED[args.vary]
    values = [value.strip() for value in (args.values or usual).split(",")]
    if len(set(values)) < len(values):
        raise UsageError(f"--values {args.values}: a value stands there twice")
    given = {word.partition("=")[0] for word in args.rest}
    varied = [word for word in arguments(usual.split(",")[0]) if word.startswith("--")]
    for option in (*OF_ONE_RUN, *varied):
        if option in given:
            raise UsageError(f"{option} is settled by the comparison, or has no effect in it: leave it out")
    training_options(SYSTEM, args.rest)  # what is wrong with these is not said of --values
    arms: dict[str, Namespace] = {}
    for value in values:
        try:
            made = training_options(SYSTEM, [*args.rest, *arguments(value)])
        except UsageError as error:
            first = str(error).splitlines()[0]
            raise UsageError(f"{value!r} is no value of --values with --vary {args.vary}: {first}") from error
        if same := next((name for name, arm in arms.items() if vars(arm) == vars(made)), None):
            raise UsageError(f"--values {args.values}: {same} and {value} are the same arm")
        arms[value] = made
    found = compare(SYSTEM, arms, seeds=args.seeds, tokens=args.tokens, prompt=args.prompt) | {"varied": args.vary}
    print(table(found))
    return found


def _option(name: str) -> Callable[[str], list[str]]:
    return lambda value: [name, value]


def _vocabulary(value: str) -> list[str]:
    kind, colon, size = value.rpartition(":")
    if not colon and not size.isdecimal():
        raise UsageError(f"a vocabulary is its kind and size, as in {value}:80")
    return ["--tokenizer", kind or "word", "--vocab-size", size]


# options of `train` that mean nothing here: how long, where to, and what is looked at on the way
OF_ONE_RUN = (
    "--max-steps", "--epochs", "--resume", "--experiment-name", "--output-dir", "--save-steps", "--eval-steps",
    "--max-new-tokens", "--stop-on-alert", "--sample-every",
)  # fmt: skip
# what a comparison may vary: its usual values, and the options of `train` that a value stands for
VARIED: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    "phase": ("1,2", _option("--phase")),
    "rate": ("1e-3,1e-5,3e-4,3e-3", _option("--learning-rate")),
    "attention": ("causal,bidirectional", _option("--attention")),
    "norm": ("pre,post", _option("--norm-placement")),
    "size": ("256,128,512", _option("--width")),
    "vocabulary": ("word:1000,word:8000,character:80", _vocabulary),
}

SYSTEM = System(
    name="story",
    summary="A decoder over short stories: word or character tokenizer, two training phases.",
    sizes=SIZES,
    build=build,
    tokenizer=word_level,
    add_arguments=add_arguments,
    defaults={"vocab_size": 2000, "max_length": 128},
    recipes={"1": FIRST, "2": SECOND},
    recipe_option="phase",
    add_compare_arguments=add_compare_arguments,
    compare=compare,
    compare_trains=True,
)
