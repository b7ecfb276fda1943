"""Tokenizers: one made from the training texts where no base brings its own, and a padding id that is nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from models.training.errors import UsageError

if TYPE_CHECKING:
    from torch.nn import Embedding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")


def byte_pairs(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's (Sennrich et al. 2016), digits one by one, trained on these texts; lossless.

    `size` is the largest vocabulary, special tokens PAD 0, UNK 1, BOS 2, EOS 3 included. Raises UsageError where it is
    too small for the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 256 + len(SPECIAL):
        raise UsageError(f"--vocab-size {size}: byte pairs need at least {256 + len(SPECIAL)} (256 bytes, 4 specials)")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token of its own.

    Where there is none, or it is EOS (the usual makeshift), `<pad>` is added: otherwise whoever masks by id loses the
    end of every text, and whoever does not trains on padding.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Enlarge the embedding where the tokenizer has ids beyond it (a `<pad>` that was added), and name the specials."""
    rows = cast("Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(tokenizer, name)
        setattr(model.config, name, value)
        if model.generation_config is not None:
            setattr(model.generation_config, name, value)
