"""Ways of training, compared fairly: one set of texts, one split, the same tokens, seeds and initial weights.

Every arm is trained once per seed. Within a seed the arms start from the same weights and read the same batches in the
same order, so that they are compared in pairs, and the interval is over seeds. What is measured is the validation
text's plain cross-entropy and accuracy, whatever loss was trained on.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.training.data import IGNORED, Example, PadRight, data_hash, encode, hold_out, load_examples
from models.training.errors import UsageError
from models.training.evaluation import generate
from models.training.experiment import versions
from models.training.losses import PlainEvaluation
from models.training.run import tokenizer_kind, training_arguments, training_loss
from models.training.systems import Preparation, System
from models.training.tokenizing import fit_vocabulary
from models.training.words import normal_form

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, list[int]]]
FIGURES = ("loss", "accuracy", "prefix_accuracy", "leak", "nats_per_character")
PREFIXES = 8  # at most so many places of a row are asked again, from the tokens before alone
# what has to be alike in all arms for their figures to mean the same
SAME = (
    "datasets", "text_unit", "max_length", "train_samples", "eval_samples", "too_long", "seed", "model", "fp16",
    "bf16", "gradient_checkpointing", "use_lora",
)  # fmt: skip
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 1 to 10 degrees


@dataclass(frozen=True)
class Scores:
    """On the validation rows.

    `loss`: nats a token. `accuracy`: share of tokens. `prefix_accuracy`: at up to PREFIXES places of each row, given
    nothing but the tokens before, as in generation; `leak`: how much better the answers at these places are with the
    whole row in view, which for a causal model is 0. `nats_per_character` counts an unknown word as one of all texts'
    unknown words by chance (Ueberla 1994), which makes vocabularies comparable.
    """

    loss: float
    accuracy: float
    prefix_accuracy: float
    leak: float
    nats_per_character: float


@dataclass(frozen=True)
class Text:
    """The texts as one tokenizer gives them: packed blocks, all of `max_length` tokens for training.

    `unknown_kinds`: different words of training and validation texts that the vocabulary lacks; `unknown`: how often
    one is to be predicted in validation.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    validation: Rows
    unknown_kinds: int
    unknown: int
    characters: int


def compare(system: System, arms: Mapping[str, Namespace], *, seeds: int, tokens: int, prompt: str) -> dict[str, Any]:
    """Train every arm with seeds args.seed, args.seed + 1, ...; figures by arm, and their differences to the first.

    `arms`: complete options of `train`, by name. `tokens`: how many each reads in training. `prompt`: what each goes on
    with at the end. Raises UsageError, before anything is trained, for what would be unfair (arms that read other texts
    or other seeds, budgets that are no whole number of steps, fewer than two seeds) or cannot be built.
    """
    from transformers import set_seed

    refuse_unfair(arms, seeds, tokens)
    base, first = next(iter(arms.items()))
    train_rows, validation_rows, twice = split_texts(first)
    if len({args.tokenizer for args in arms.values()}) > 1:  # all are to predict the same characters
        train_rows, validation_rows = _normal(train_rows), _normal(validation_rows)
    # every optimizer step of every arm takes whole batches: what is left at the end of an epoch would be a smaller one
    group = math.lcm(*(args.batch_size * args.accumulation for args in arms.values()))
    texts: dict[tuple[str | None, int], Text] = {}
    for args in arms.values():
        kind = (args.tokenizer, args.vocab_size)
        if kind not in texts:
            texts[kind] = encoded(args, system, train_rows, validation_rows, group)
        system.build(args, texts[kind].tokenizer)  # what does not fit is said before an hour of the other arms
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in range(first.seed, first.seed + seeds):
        starts: dict[tuple[Any, ...], str] = {}
        for name, args in arms.items():
            text = texts[args.tokenizer, args.vocab_size]
            set_seed(seed)
            model = system.build(args, text.tokenizer)
            fit_vocabulary(model, text.tokenizer)
            start = weights_hash(model)
            shapes = tuple((key, tuple(value.shape)) for key, value in model.state_dict().items())
            if starts.setdefault(shapes, start) != start:
                raise RuntimeError(f"{name} starts from other weights than an arm of the same shapes, seed {seed}")
            runs[name].append(_run(system, args, model, text, seed, tokens, prompt) | {"initial_weights": start})
    return {
        "system": system.name,
        "seeds": list(range(first.seed, first.seed + seeds)),
        "tokens": tokens,
        "data": {
            "datasets": first.datasets, "texts": len(train_rows), "validation_texts": len(validation_rows),
            "left_out": twice, "train_sha256": data_hash(train_rows), "validation_sha256": data_hash(validation_rows),
        },
        "machine": machine(),
        "versions": versions(),
        "arms": {name: _summary(args, texts[args.tokenizer, args.vocab_size], runs[name])
                 for name, args in arms.items()},
        "differences": {name: _paired(runs[name], runs[base]) for name in list(arms)[1:]},
    }  # fmt: skip


def refuse_unfair(arms: Mapping[str, Namespace], seeds: int, tokens: int) -> None:
    """Raises UsageError."""
    if len(arms) < 2:
        raise UsageError(f"there is one arm, {', '.join(arms)}: a comparison takes two different ones")
    if seeds < 2:
        raise UsageError("--seeds 1: one run shows no spread, and so no difference; take at least 2")
    first_name, first = next(iter(arms.items()))
    for name, args in arms.items():
        for option in SAME:
            one, other = getattr(first, option), getattr(args, option)
            if one != other:
                raise UsageError(
                    f"--{option.replace('_', '-')} is {one!r} for {first_name} and {other!r} for {name}: figures on "
                    "other texts or of another start do not compare"
                )
        step = args.batch_size * args.accumulation * args.max_length
        if tokens % step:
            near = max(1, round(tokens / step)) * step
            raise UsageError(
                f"--tokens {tokens} is no whole number of steps of {name}: a step reads {args.batch_size} x "
                f"{args.accumulation} x {args.max_length} = {step} tokens; {near} would do"
            )
        if args.use_lora or args.model:
            raise UsageError("compare trains from fresh weights: leave out --model and --use-lora")


def split_texts(args: Namespace) -> tuple[list[Example], list[Example], int]:
    """One split for all; training texts that are validation texts, too, are left out and counted.

    Texts are the same when their normal forms are: case or a mark does not make a held-out text a new one. Raises
    UsageError for rows with a prompt.
    """
    shared = {"seed": args.seed, "unit": args.text_unit}
    train = load_examples(args.datasets, "train", limit=args.train_samples, **shared)
    validation = load_examples(args.datasets, "test", limit=args.eval_samples, **shared)
    if not validation:
        train, validation = hold_out(train, args.eval_samples)
    if not validation:
        raise UsageError("there is no validation text: raise --eval-samples, or give more than one text")
    for row in (*train, *validation):
        if row.prompt:
            raise UsageError(f"compare takes plain texts, and this row has a prompt: {row.origin}")
    held = {normal_form(row.completion) for row in validation}
    kept = [row for row in train if normal_form(row.completion) not in held]
    if not kept:
        raise UsageError("every training text is a validation text, too: nothing is left to train on")
    return kept, validation, len(train) - len(kept)


def _normal(rows: list[Example]) -> list[Example]:
    return [replace(row, completion=normal_form(row.completion)) for row in rows]


def encoded(
    args: Namespace, system: System, train_rows: list[Example], validation_rows: list[Example], group: int
) -> Text:
    """The texts in the tokens of one arm; as many blocks as `group` divides."""
    words = [row.completion for row in train_rows]
    tokenizer = tokenizer_kind(args.tokenizer, system)(words, args.vocab_size)
    train, _ = encode(train_rows, tokenizer, args.max_length, drop_long=args.too_long == "drop")
    validation, _ = encode(validation_rows, tokenizer, args.max_length, drop_long=args.too_long == "drop")
    blocks = [row for row in train if len(row["input_ids"]) == args.max_length]
    whole = len(blocks) // group * group
    if not whole:
        raise UsageError(
            f"the texts come to {len(blocks)} blocks of --max-length {args.max_length}, and a step of every arm takes "
            f"{group}"
        )
    unknown = sum(row["labels"][1:].count(tokenizer.unk_token_id) for row in validation)
    every = (row.completion for row in (*train_rows, *validation_rows))
    kinds = {piece for text in every for piece in _pieces(tokenizer, text)} - tokenizer.get_vocab().keys()
    return Text(
        tokenizer, blocks[:whole], validation, unknown_kinds=len(kinds), unknown=unknown,
        characters=sum(len(row.completion) for row in validation_rows),
    )  # fmt: skip


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """The words (or characters) of a text, before they are looked up."""
    backend = tokenizer.backend_tokenizer
    stated = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(stated)]


def _run(
    system: System, args: Namespace, model: Any, text: Text, seed: int, tokens: int, prompt: str
) -> dict[str, Any]:
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    steps = tokens // (args.batch_size * args.accumulation * args.max_length)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        options = Namespace(**{**vars(args), "seed": seed, "max_steps": steps, "epochs": None, "quiet": True})
        arguments = training_arguments(options, Path(folder), steps=steps, evaluates=False)
        arguments.save_strategy = "no"
        arguments.include_num_input_tokens_seen = "all"
        collate = PadRight(text.tokenizer.pad_token_id)
        trainer = PlainEvaluation(
            model=model, args=arguments, train_dataset=text.train, data_collator=collate,
            processing_class=text.tokenizer, compute_loss_func=training_loss(args, system),
            callbacks=system.callbacks(options, Preparation(model, text.tokenizer, text.train, collate)),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    seen = int(trainer.state.num_input_tokens_seen)
    if seen != tokens:
        raise RuntimeError(f"the arm read {seen} tokens instead of {tokens}")
    model.eval()
    scores = score(model, text, args.batch_size)
    said = {}
    if math.isfinite(scores.loss):  # of an arm that diverged nothing can be drawn
        set_seed(seed)
        ways = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, **SAMPLING}}
        said = {
            way: generate(model, text.tokenizer, [prompt], max_new_tokens=60, **how)[0] for way, how in ways.items()
        }
    return {
        "seed": seed, **asdict(scores), "steps": steps, "seconds": seconds, "written": said,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip


def score(model: Any, text: Text, batch_size: int) -> Scores:
    """Plain cross-entropy and accuracy on the validation rows, and accuracy from the tokens before alone."""
    import torch

    total, right, counted = 0.0, 0, 0
    asked, told, seen = 0, 0, 0  # places, right answers from the tokens before, and with the whole row in view
    collate = PadRight(text.tokenizer.pad_token_id)
    for start in range(0, len(text.validation), batch_size):
        batch = collate(text.validation[start : start + batch_size])
        ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            target = labels[:, 1:]
            held = target != IGNORED
            total += float(torch.nn.functional.cross_entropy(logits[held], target[held], reduction="sum"))
            hits = logits.argmax(-1) == target
            right += int(hits[held].sum())
            counted += int(held.sum())
            for end in range(1, ids.shape[1], max(1, math.ceil((ids.shape[1] - 1) / PREFIXES))):
                here = held[:, end - 1]
                if not here.any():
                    continue
                said = model(input_ids=ids[:, :end], attention_mask=mask[:, :end]).logits[:, -1].argmax(-1)
                told += int((said == target[:, end - 1])[here].sum())
                seen += int(hits[:, end - 1][here].sum())
                asked += int(here.sum())
    spelling = text.unknown * math.log(text.unknown_kinds) if text.unknown_kinds else 0.0
    return Scores(
        total / counted, right / counted, told / asked, (seen - told) / asked, (total + spelling) / text.characters
    )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _summary(args: Namespace, text: Text, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    read = runs[0]["steps"] * args.batch_size * args.accumulation
    return {
        "options": {name: value for name, value in vars(args).items() if not callable(value)},
        "vocabulary": len(text.tokenizer),
        "unknown_share": text.unknown / max(1, sum(len(row["labels"]) - 1 for row in text.validation)),
        "parameters": runs[0]["parameters"],
        "epochs": read / len(text.train),
        **{name: interval([run[name] for run in runs]) for name in FIGURES},
        "runs": list(runs),
    }  # fmt: skip


def _paired(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(runs, base, strict=True))
    return {name: interval([one[name] - other[name] for one, other in pairs]) for name in FIGURES}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and its 95 % confidence interval (Student's t) over independent runs: mean, low, high.

    All three are nan where a run has diverged.
    """
    if not all(map(math.isfinite, values)):
        return dict.fromkeys(("mean", "low", "high"), math.nan)
    mean = statistics.fmean(values)
    half = student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def student_t(degrees: int) -> float:
    """The 97.5 % quantile: the table, beyond it the expansion in 1 / degrees (Abramowitz and Stegun 26.7.5)."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def machine() -> dict[str, Any]:
    """What the seconds depend on."""
    import torch

    return {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def table(found: Mapping[str, Any]) -> str:
    """The figures for reading: arms, then their differences to the first."""
    seeds = len(found["seeds"])
    lines = [
        f"{found['system']}: {found['tokens']} tokens an arm, {seeds} seeds, {found['data']['texts']} texts, "
        f"{found['data']['validation_texts']} held out; mean over seeds and 95 % interval",
        f"{'':>16} {'parameters':>11} {'epochs':>7} {'loss':>24} {'accuracy':>24} {'from prefix':>12} "
        f"{'nats/char':>10}",
    ]
    for name, arm in found["arms"].items():
        lines.append(
            f"{name:>16} {arm['parameters']:>11,} {arm['epochs']:>7.2f} {_shown(arm['loss'], 3):>24} "
            f"{_shown(within(arm['accuracy']), 1, 100):>24} {100 * arm['prefix_accuracy']['mean']:>11.1f}% "
            f"{arm['nats_per_character']['mean']:>10.3f}"
        )
    base = next(iter(found["arms"]))
    lines.append(f"differences to {base}, paired by seed:")
    for name, difference in found["differences"].items():
        lines.append(
            f"{name:>16} {'':>19} {_shown(difference['loss'], 3):>24} {_shown(difference['accuracy'], 1, 100):>24} "
            f"{'':>12} {difference['nats_per_character']['mean']:>+10.3f}"
        )
    for name, arm in found["arms"].items():
        if arm["leak"]["mean"] > 0.01:
            lines.append(
                f"{name} sees what it is asked for: from the tokens before alone, as in generation, it is right in "
                f"{arm['prefix_accuracy']['mean']:.1%}, and at the same places with the text in view in "
                f"{arm['prefix_accuracy']['mean'] + arm['leak']['mean']:.1%}"
            )
        if lost := [str(run["seed"]) for run in arm["runs"] if not math.isfinite(run["loss"])]:
            lines.append(f"{name} diverged with seed {', '.join(lost)}: its loss is not finite, and has no mean")
    kinds = {arm["vocabulary"] for arm in found["arms"].values()}
    if len(kinds) > 1:
        lines.append("vocabularies differ: compare nats per character; loss and accuracy count other tokens")
    return "\n".join(lines)


def within(share: Mapping[str, float]) -> dict[str, float]:
    """The interval of a share, for reading: what lies below 0 or above 1 is cut off."""
    return {name: min(1.0, max(0.0, value)) if math.isfinite(value) else value for name, value in share.items()}


def _shown(value: Mapping[str, float], digits: int, scale: float = 1) -> str:
    mean, low, high = (scale * value[name] for name in ("mean", "low", "high"))
    sign = "%" if scale == 100 else ""
    return f"{mean:.{digits}f}{sign} [{low:.{digits}f}, {high:.{digits}f}]"
