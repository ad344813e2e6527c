"""Tokenizers that differ from the tiny model's own."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def without_names(model_path: Any) -> Any:
    """What ends a turn is special in the tokenizer's file, and has no name there."""
    own = AutoTokenizer.from_pretrained(model_path)
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=own.chat_template,
    )


def metaspace(scheme: str) -> Any:
    """A tokenizer that writes a space before what begins a text, as SentencePiece does."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        ["the quick brown fox jumps quickly\n"] * 20,
        trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
