"""One training run: everything that can be wrong is found before the folder is made."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.training.data import PadRight, data_hash, encode, hold_out, load_examples
from models.training.errors import UsageError
from models.training.evaluation import ExactMatch, exact_match
from models.training.experiment import SCHEMA_VERSION, Experiment, is_first, versions
from models.training.options import validate
from models.training.systems import Loss, Preparation, System
from models.training.tokenizing import byte_pairs, fit_vocabulary, with_padding
from models.training.words import characters, word_level

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

SAMPLES, SAMPLE_PROMPT, SAMPLE_TOKENS = 8, 4, 32  # what --sample-every draws: rows, and tokens of each


def train(args: Namespace, system: System) -> dict[str, Any]:
    """Train, evaluate, save; returns what stands in results.json. Raises UsageError with the folder untouched."""
    validate(args)
    experiment = Experiment(args)
    experiment.check()
    from transformers import set_seed
    from transformers.utils import logging

    if args.quiet:
        logging.disable_progress_bar()
    set_seed(args.seed)
    train_rows = load_examples(args.datasets, "train", limit=args.train_samples, seed=args.seed, unit=args.text_unit)
    eval_rows = load_examples(args.datasets, "test", limit=args.eval_samples, seed=args.seed, unit=args.text_unit)
    if not eval_rows and args.eval_samples:
        train_rows, eval_rows = hold_out(train_rows, args.eval_samples)
    tokenizer = _tokenizer(args, system, experiment, [row.prompt + row.completion for row in train_rows])
    train_set, train_dropped = encode(train_rows, tokenizer, args.max_length, drop_long=args.too_long == "drop")
    eval_set, eval_dropped = (
        encode(eval_rows, tokenizer, args.max_length, drop_long=args.too_long == "drop") if eval_rows else ([], 0)
    )
    set_seed(args.seed)  # the same initial weights, whatever the data and the tokenizer have drawn
    model = system.build(args, tokenizer)
    fit_vocabulary(model, tokenizer)
    _check_context(model, args)

    collate = PadRight(tokenizer.pad_token_id)
    own_callbacks = system.callbacks(args, Preparation(model, tokenizer, train_set, collate))

    experiment.begin()
    if is_first() and not args.resume:
        tokenizer.save_pretrained(experiment.folder / "tokenizer")
    wrapped: Any = _with_lora(model, args, system) if args.use_lora else model
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    if args.gradient_checkpointing:
        # renamed in later releases; not reentrant, because under LoRA no gradient reaches a block's input
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.config.use_cache = False
    trainer, monitors = _trainer(args, system, experiment, wrapped, tokenizer, train_set, eval_set, own_callbacks)

    def match(label: str) -> ExactMatch | None:
        return exact_match(
            trainer.model, tokenizer, eval_rows, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size * 2,
            context=_context(model), quiet=args.quiet, label=label,
        )  # fmt: skip

    seconds: dict[str, float] = {}
    started = time.perf_counter()
    before = None
    if args.resume:
        _refuse_finished(args, experiment)
        before = _earlier(experiment)
    else:
        loss_before = trainer.evaluate()["eval_loss"] if eval_set else None
        matched = match("exact match before")
        before = {"loss": loss_before, "exact_match": _as_json(matched)}
        if is_first():
            experiment.write("before.json", before)
    seconds["evaluate_before"] = time.perf_counter() - started

    started = time.perf_counter()
    checkpoint = experiment.last_checkpoint() if args.resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds["train"] = time.perf_counter() - started

    started = time.perf_counter()
    final = _finished(trainer.model, args, experiment)
    found = system.finish(final, args, own_callbacks)
    trainer.model = trainer.model_wrapped = final
    loss_after = trainer.evaluate()["eval_loss"] if eval_set else None
    after = {"loss": loss_after, "exact_match": _as_json(match("exact match after"))}
    seconds["evaluate_after"] = time.perf_counter() - started
    log = trainer.state.log_history
    results = {
        "schema_version": SCHEMA_VERSION,
        "system": system.name,
        "options": experiment.options,
        "seed": args.seed,
        "versions": versions(),
        "device": str(trainer.args.device),
        "data": {
            "datasets": args.datasets,
            "train": {"examples": len(train_rows), "used": len(train_set), "too_long": train_dropped,
                      "sha256": data_hash(train_rows)},
            "eval": {"examples": len(eval_rows), "used": len(eval_set), "too_long": eval_dropped,
                     "sha256": data_hash(eval_rows)},
        },
        "parameters": {
            "total": sum(p.numel() for p in final.parameters()),
            "trained": trained,
        },
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "diverged": _diverged(final, [loss_after, *[entry["loss"] for entry in log if "loss" in entry][-1:]]),
        "loss_curve": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
        "eval_curve": [[entry["step"], entry["eval_loss"]] for entry in log if "eval_loss" in entry],
        "before": before,
        "after": after,
        "alerts": [str(alert) for alert in monitors.alerts],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        system.name: found,
    }  # fmt: skip
    if is_first():
        final.save_pretrained(experiment.folder / "final")
        tokenizer.save_pretrained(experiment.folder / "final")
        experiment.write("results.json", results)
    return results


def _diverged(model: PreTrainedModel, losses: Sequence[float | None]) -> bool:
    """Whether a loss or a weight at the end is not finite."""
    finite = all(loss is None or math.isfinite(loss) for loss in losses)
    return not (finite and all(bool(weight.isfinite().all()) for weight in model.parameters()))


def _tokenizer(args: Namespace, system: System, experiment: Experiment, texts: list[str]) -> PreTrainedTokenizerBase:
    """A resumed run's own, else the base's, else one made from the texts."""
    from transformers import AutoTokenizer

    if args.resume:
        resumed: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(experiment.folder / "tokenizer")
        return resumed
    if args.model is None:
        return with_padding(tokenizer_kind(args.tokenizer, system)(texts, args.vocab_size))
    check_base(args.model, "--model")
    try:
        return with_padding(AutoTokenizer.from_pretrained(args.model))
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model {args.model}: it has no tokenizer that can be loaded ({error})") from error


def tokenizer_kind(named: str | None, system: System) -> Callable[[Sequence[str], int], PreTrainedTokenizerBase]:
    """What makes a tokenizer from (texts, size): the one that is named, else the system's own, else byte pairs."""
    if named is None:
        return system.tokenizer or byte_pairs
    return {"byte-pair": byte_pairs, "word": word_level, "character": characters}[named]


def check_base(base: str, option: str) -> None:
    """Raises UsageError for a base that is no checkpoint, in one line instead of the library's page."""
    from transformers import AutoConfig

    if base.startswith((".", "/", "~")) and not Path(base).is_dir():
        raise UsageError(f"{option} {base}: there is no such directory")
    try:
        AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{option} {base}: no checkpoint of a known kind there, and none on the hub ({first}){_meant(base)}"
        ) from error


def _meant(base: str) -> str:
    """An experiment's folder holds its model in final/."""
    final = Path(base) / "final"
    return f"; did you mean {final}?" if (final / "config.json").is_file() else ""


def _context(model: Any) -> int | None:
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _check_context(model: PreTrainedModel, args: Namespace) -> None:
    context = _context(model)
    if context is not None and args.max_length > context:
        raise UsageError(f"--max-length {args.max_length}: the model has {context} positions")


def _with_lora(model: PreTrainedModel, args: Namespace, system: System) -> Any:
    """The model in a PEFT wrapper. With --fp16 or --bf16 the frozen weights are kept in that type, to save memory."""
    import torch
    from peft import LoraConfig, get_peft_model

    if args.fp16 or args.bf16:
        half = torch.float16 if args.fp16 else torch.bfloat16
        torch.nn.Module.to(model, dtype=half)  # the adapter itself stays in float32
    targets = system.lora_targets
    whole = [
        name
        for name in system.lora_keeps
        if any(True for place, part in model.named_modules() if place.endswith(name) for _ in part.parameters())
    ]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=args.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets), modules_to_save=whole or None,
    )  # fmt: skip
    return get_peft_model(model, config)


def _finished(model: Any, args: Namespace, experiment: Experiment) -> Any:
    """The trained model itself: a LoRA adapter is saved apart and merged."""
    if not args.use_lora:
        return model
    if is_first():
        model.save_pretrained(experiment.folder / "adapter")
    return model.merge_and_unload()


def _trainer(
    args: Namespace, system: System, experiment: Experiment, model: Any, tokenizer: Any, train_set: list[Any],
    eval_set: list[Any], callbacks: list[Any],
) -> tuple[Any, Any]:  # fmt: skip
    from transformers.trainer_callback import PrinterCallback

    from lmconform.monitors import generated, standard
    from models.training.losses import PlainEvaluation

    sample = None
    if args.sample_every is not None:
        prompts = [row["input_ids"][:SAMPLE_PROMPT] for row in train_set[:SAMPLES]]
        sample = generated(
            prompts, max_new_tokens=SAMPLE_TOKENS, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    monitors = standard(
        eos_token_id=tokenizer.eos_token_id, stop=args.stop_on_alert, log=str(experiment.folder / "monitors.jsonl"),
        sample=sample, sample_every=args.sample_every,
    )  # fmt: skip
    trainer = PlainEvaluation(
        model=model,
        args=training_arguments(args, experiment.folder, steps=_steps(args, len(train_set)), evaluates=bool(eval_set)),
        train_dataset=train_set,
        eval_dataset=eval_set or None,
        data_collator=PadRight(tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_loss_func=training_loss(args, system),
        callbacks=[*callbacks, *monitors],
    )
    if args.quiet:
        trainer.remove_callback(PrinterCallback)  # it takes the bars' place
    return trainer, monitors


def training_loss(args: Namespace, system: System) -> Loss | None:
    """The system's own loss, else the smoothed one where that is asked for, else None: the model's."""
    from models.training.losses import smoothed

    loss = system.loss(args) if system.loss is not None else None
    return smoothed(args.label_smoothing) if loss is None and args.label_smoothing else loss


def _steps(args: Namespace, examples: int) -> int:
    if args.max_steps is not None:
        return int(args.max_steps)
    each = -(-examples // (args.batch_size * args.accumulation))
    return max(1, int(each * args.epochs))


def training_arguments(args: Namespace, folder: Path, *, steps: int, evaluates: bool) -> TrainingArguments:
    """The Trainer's arguments for these options: AdamW, one schedule step an optimizer step, checkpoints by steps."""
    from transformers import TrainingArguments

    fifth = max(1, steps // 5)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.max_steps or -1,
        num_train_epochs=args.epochs or 1.0,
        learning_rate=args.learning_rate,
        # transformers' "constant" takes warmup_steps and does not warm up
        lr_scheduler_type="constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        max_grad_norm=args.max_grad_norm,
        fp16=args.fp16,
        bf16=args.bf16,
        seed=args.seed,
        use_cpu=args.cpu,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=args.eval_steps or fifth,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=args.save_steps or fifth,
        save_total_limit=2,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=args.quiet,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _as_json(matched: ExactMatch | None) -> dict[str, Any] | None:
    return None if matched is None else vars(matched)


def _refuse_finished(args: Namespace, experiment: Experiment) -> None:
    """Raises UsageError where all steps are done and the model is written: the Trainer would add one more."""
    from transformers import TrainerState

    checkpoint = experiment.last_checkpoint()
    if checkpoint is None or not (experiment.folder / "final").is_dir():
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    planned = args.max_steps or state.max_steps
    if state.global_step >= planned:
        raise UsageError(f"{experiment.folder} is finished: {state.global_step} of {planned} steps; nothing to resume")


def _earlier(experiment: Experiment) -> dict[str, Any] | None:
    """What was measured before the first step of a run that is resumed; None where it died before that."""
    import json

    file = experiment.folder / "before.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
