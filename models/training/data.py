"""Data sets in the hub's own column formats, as prompts, completions and final answers.

| columns | what | prompt and completion |
| --- | --- | --- |
| question, answer | GSM8K; the answer ends in `#### N` | question, whole answer |
| problem, solution | MATH; the solution holds `\\boxed{}` | problem, whole solution |
| text | plain text | nothing, the text; packed into blocks |
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.training.answers import final_answer
from models.training.errors import UsageError
from models.training.stories import stories

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

HUB = {"gsm8k": ("openai/gsm8k", "main"), "math": ("DigitalLearningGmbH/MATH-lighteval", None)}
FORMATS = {("question", "answer"): True, ("problem", "solution"): True, ("text",): False}  # whether there are answers
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "dev")}
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One row. `prompt` is empty for plain text; `gold` is the final answer, None where there is none."""

    prompt: str
    completion: str
    gold: str | None
    origin: str  # for messages: data set, split and row


# -- reading -----------------------------------------------------------------------------------------------------------


def load_examples(
    names: str, split: str, *, limit: int | None = None, seed: int = 0, unit: str = "line"
) -> list[Example]:
    """The rows of a comma-separated list of data sets (name, hub id or local path), shuffled together by `seed`.

    `split` is "train" or "test"; a data set without test rows gives an empty list for "test", so that the caller can
    hold some out. `unit` says what a text is in a local .txt file: "line", or "story" (models.training.stories). Raises
    UsageError that names the data set for a wrong path, missing columns, empty rows or no rows.
    """
    examples: list[Example] = []
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UsageError("--datasets names no data set: give names, hub ids or paths, as in --datasets gsm8k,math")
    for name in wanted:
        examples += _read(name, split, unit)
    random.Random(seed).shuffle(examples)
    return examples if limit is None else examples[:limit]


def _read(name: str, split: str, unit: str) -> list[Example]:
    rows = _rows(name, split, unit)
    if rows is None:
        return []
    columns = list(rows.column_names)
    kind = next((kind for kind in FORMATS if set(kind) <= set(columns)), None)
    if kind is None:
        known = "; ".join(" and ".join(kind) for kind in FORMATS)
        raise UsageError(f"{name}: its columns are {', '.join(columns) or 'none'}, and none of these is there: {known}")
    if len(rows) == 0:
        raise UsageError(f"{name}: the {split} split has no rows")
    return list(_examples(name, split, kind, rows))


def _examples(name: str, split: str, kind: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    for number, row in enumerate(rows):
        origin = f"{name}, {split} row {number}"
        values = [row[column] for column in kind]
        if not FORMATS[kind]:
            if values[0] and values[0].strip():  # blank lines of a text file are no examples
                yield Example("", values[0], None, origin)
            continue
        for column, value in zip(kind, values):
            if not isinstance(value, str) or not value.strip():
                raise UsageError(f"{origin}: the column {column!r} is empty ({value!r})")
        gold = final_answer(values[1])
        if gold is None:
            raise UsageError(
                f"{origin}: the column {kind[1]!r} has no final answer (a line '#### N', or \\boxed{{...}}): "
                f"...{values[1][-60:]!r}"
            )
        yield Example(f"Question: {values[0].strip()}\nAnswer:", " " + values[1].strip(), gold, origin)


def _rows(name: str, split: str, unit: str) -> Any | None:
    """The data set's rows as `datasets` gives them; None where it has no such split."""
    place = local(name)
    if place is not None:
        return _local_rows(name, place, split, unit)
    import datasets

    hub_id, config = HUB.get(name, (name, None))
    for candidate in SPLITS[split]:
        try:
            return datasets.load_dataset(hub_id, config, split=candidate)
        except ValueError as error:  # no such split; anything else it says is passed on
            if "split" not in str(error).lower():
                raise UsageError(f"{name}: {error}") from error
        except Exception as error:
            raise UsageError(
                f"{name}: there is no such path, and loading {hub_id} from the hub failed "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
                "Give a local path, or set LMCONFORM_DATA to a folder that holds it."
            ) from error
    return None


def local(name: str) -> Path | None:
    """A path as it was given, else a folder or file of that name in LMCONFORM_DATA; None where it is a hub id."""
    if Path(name).exists():
        return Path(name)
    shelf = os.environ.get("LMCONFORM_DATA", "")
    if shelf and (Path(shelf) / name).exists():
        return Path(shelf) / name
    if name.startswith((".", "/", "~")) or name.endswith(tuple(READERS)):
        raise UsageError(f"{name}: there is no such file or folder")
    return None


def _local_rows(name: str, place: Path, split: str, unit: str) -> Any | None:
    import datasets

    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(place))
        if isinstance(saved, datasets.DatasetDict):
            found = next((saved[key] for key in SPLITS[split] if key in saved), None)
            return found
        return saved if split == "train" else None
    if place.is_file():
        files = [place] if split == "train" else []
    else:
        every = sorted(file for file in place.iterdir() if file.suffix in READERS)
        files = next(
            (some for key in SPLITS[split] if (some := [file for file in every if file.name.startswith(key)])), []
        )
        if not files and split == "train":
            raise UsageError(
                f"{name}: the folder {place} has no train file (train*.jsonl, .json, .parquet, .csv or .txt)"
                + (f"; it holds {', '.join(file.name for file in every[:5])}" if every else "")
            )
    if not files:
        return None
    if files[0].suffix not in READERS:
        raise UsageError(f"{name}: {files[0].name} is none of {', '.join(READERS)}")
    if all(file.stat().st_size == 0 for file in files):
        raise UsageError(f"{name}: {files[0].name} is empty")
    try:
        if files[0].suffix == ".txt" and unit == "story":
            found = [story for file in files for story in stories(file.read_text(encoding="utf-8"))]
            return datasets.Dataset.from_dict({"text": found})
        return datasets.load_dataset(
            READERS[files[0].suffix], data_files={"train": [str(file) for file in files]}, split="train"
        )
    except Exception as error:  # the readers raise their own kinds; what they say is what the user needs
        cause = error.__cause__ or error
        raise UsageError(f"{name}: {files[0].name} cannot be read: {type(cause).__name__}: {cause}") from error


def hold_out(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Training and validation rows of a data set that brings no test split: the last tenth, at most `count`."""
    size = min(count, max(1, len(examples) // 10)) if len(examples) > 1 else 0
    return (examples[:-size], examples[-size:]) if size else (examples, [])


def data_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the rows as they are used, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completion], ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, *, drop_long: bool = False
) -> tuple[list[dict[str, list[int]]], int]:
    """input_ids and labels of every example, and how many were left out as too long.

    Labels of the prompt are -100; the completion ends in EOS, which is a label once. Plain texts are packed, EOS
    between them, into blocks of `max_length`. An example is never cut, since its answer stands at the end: one that is
    longer raises UsageError, or is left out with `drop_long`; UsageError too where nothing is left.
    """
    opening = opening_ids(tokenizer)
    ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    encoded: list[dict[str, list[int]]] = []
    stream: list[int] = []
    long: list[tuple[int, Example]] = []
    for example in examples:
        completion = ids(example.completion) + ending
        if not example.prompt:
            stream += opening + completion
            continue
        prompt = opening + ids(example.prompt)
        if len(prompt) + len(completion) > max_length:
            long.append((len(prompt) + len(completion), example))
            continue
        encoded.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    for start in range(0, len(stream), max_length):
        block = stream[start : start + max_length]
        if len(block) > 1:  # one token alone predicts nothing
            encoded.append({"input_ids": block, "labels": list(block)})
    if long and not drop_long:
        longest, example = max(long, key=lambda pair: pair[0])
        raise UsageError(
            f"{len(long)} of {len(examples)} examples are longer than --max-length {max_length}; the longest has "
            f"{longest} tokens ({example.origin}). Raise --max-length, or leave them out with --too-long drop"
        )
    if not encoded:
        shortest = min(length for length, _ in long) if long else 0
        raise UsageError(
            f"no example is left to train on: the shortest has {shortest} tokens, --max-length is {max_length}"
            if long
            else "no example is left to train on: the data sets hold blank rows only"
        )
    return encoded, len(long)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where this tokenizer puts one in front by itself, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


class PadRight:
    """Batches of encoded examples: ids [batch, time] padded on the right, attention_mask, labels -100 at padding.

    What counts is told by length, never by id: a padding id that is some other token's does no harm.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        import torch

        time = max(len(example["input_ids"]) for example in examples)
        rows = [(example["input_ids"], example["labels"], time - len(example["input_ids"])) for example in examples]
        return {
            "input_ids": torch.tensor([ids + [self.pad] * rest for ids, _, rest in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * rest for ids, _, rest in rows]),
            "labels": torch.tensor([labels + [IGNORED] * rest for _, labels, rest in rows]),
        }
