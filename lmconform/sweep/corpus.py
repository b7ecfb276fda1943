"""What is trained on: a text of the user's, or one made by rule; always as batches of token ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.conventions import first_line
from lmconform.options import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen
    from lmconform.sweep.batches import Batch, Batches

SENTENCE = (0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 9, 1, 10, 11, 2)  # the words; 0, 1 and 2 come more than once
WORDS = 48  # of the rule's language, at most
ROWS, TIME = 2, 16
KEPT = 64  # batches


@dataclass(frozen=True)
class Corpus:
    """One long row of token ids. `name` says in words what it is."""

    ids: Tensor
    name: str

    @property
    def entropy(self) -> float:
        """Nats a token, by frequencies alone: what a model that knows no context can reach."""
        return entropy(Counter(self.ids.tolist()).values())

    def batches(self, specimen: Specimen, rows: int = ROWS, time: int = TIME) -> Batches:
        """Windows drawn at random, the same for the same step and seed."""
        import torch

        from lmconform.sweep.batches import Batch

        time = min(specimen.longest(time), len(self.ids) - 1)
        made: dict[tuple[int, int], Batch] = {}

        def batch(step: int, seed: int) -> Batch:
            if (step, seed) not in made:
                if len(made) >= KEPT:
                    made.clear()
                generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
                starts = torch.randint(len(self.ids) - time, (rows, 1), generator=generator)
                windows = self.ids[starts + torch.arange(time + 1)].to(specimen.device)
                targets = windows[:, 1:].contiguous()
                made[step, seed] = Batch(windows[:, :-1].contiguous(), targets)
            return made[step, seed]

        return batch


def entropy(counts: Any) -> float:
    """Nats, of a distribution given by counts."""
    counts = [count for count in counts if count]
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts)


def sentence(specimen: Specimen, seed: int) -> Tensor:
    """One sentence [1, 16] in which words come back and are followed by others: no two-word memory predicts it."""
    import torch

    ordinary = torch.tensor(specimen.ordinary_ids)
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))
    words = ordinary[order[torch.tensor(SENTENCE) % len(ordinary)]]
    return words[None, : specimen.longest(len(SENTENCE))].to(specimen.device)


def end_of_text(specimen: Specimen) -> int | None:
    """The id of the end-of-text token, where config or tokenizer name one."""
    named = structure.special_ids(specimen.module).get("eos_token_id")
    if named is None:
        named = getattr(specimen.tokenizer, "eos_token_id", None)
    return named if isinstance(named, int) and 0 <= named < specimen.vocab_size else None


def rule_corpus(specimen: Specimen, seed: int = 0, sentences: int = 600) -> Corpus:
    """Sentences of a small language: who, does what, to whom, and again who; each ends with the end-of-text token.

    Words are drawn by Zipf's law; the last word repeats the first, so that context pays.
    """
    import torch

    ordinary = specimen.ordinary_ids[:WORDS]
    end = end_of_text(specimen)
    if end is None or end in ordinary:
        end, ordinary = ordinary[0], ordinary[1:]
    generator = torch.Generator().manual_seed(seed)
    names, acts = ordinary[: len(ordinary) // 2], ordinary[len(ordinary) // 2 :]

    def draw(words: Sequence[int]) -> int:
        weights = 1 / torch.arange(1, len(words) + 1, dtype=torch.float64)
        return words[int(torch.multinomial(weights, 1, generator=generator))]

    made: list[int] = []
    for _ in range(sentences):
        who = draw(names)
        made += [who, draw(acts), draw(names)]
        if int(torch.randint(2, (1,), generator=generator)):
            made += [draw(acts), draw(names)]
        made += [who, end]
    return Corpus(torch.tensor(made), "a corpus made by rule")


def read_text(file: str) -> str:
    """The text of a file. Raises OptionError that says what is wrong with it."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OptionError(f"--text {file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text {file}: {first_line(error)}") from error
    if len(text.split()) < 8:
        raise OptionError(f"--text {file}: it holds {len(text.split())} words; a sweep needs some lines of text")
    return text


def text_corpus(specimen: Specimen, text: str, file: str) -> Corpus:
    """The text in the subject's tokens; without a tokenizer, character by character, the most frequent kept apart."""
    import torch

    if specimen.tokenizer is not None:
        encoded = specimen.tokenizer.encode(text)
        ids = list(getattr(encoded, "ids", encoded))
        if ids and not 0 <= max(ids) < specimen.vocab_size:
            raise OptionError(
                f"--text {file}: the tokenizer gives id {max(ids)}, and the model has {specimen.vocab_size} tokens"
            )
        name = f"{file}, {len(ids)} tokens of the subject's tokenizer"
    else:
        ranked = [character for character, _ in Counter(text).most_common()]
        ordinary = specimen.ordinary_ids
        rank = {character: min(index, len(ordinary) - 1) for index, character in enumerate(ranked)}
        ids = [ordinary[rank[character]] for character in text]
        name = f"{file}, {len(ids)} characters (no tokenizer was given)"
    if len(ids) < 8:
        raise OptionError(f"--text {file}: it comes to {len(ids)} tokens; a sweep needs some lines of text")
    return Corpus(torch.tensor(ids), name)
