"""Random models of real sizes, for speed: nothing is downloaded, and speed depends on no value."""

from __future__ import annotations

import json
import string
import sys
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny_model import make_tokenizer
from tokenizers import Tokenizer

VOCAB_SIZE = 151_936
# The shapes of Qwen2.5's models.
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7.6b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def make_large_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with made-up words up to a real vocabulary, so that decoding costs."""
    small = make_tokenizer()
    described = json.loads(small.backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    words = ("".join(letters) for letters in product(string.ascii_lowercase, repeat=5))
    first = len(small)
    for index, word in enumerate(islice(words, VOCAB_SIZE - first)):
        vocab["q" + word] = first + index
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        pad_token=small.pad_token,
        eos_token=small.eos_token,
        chat_template=small.chat_template,
        clean_up_tokenization_spaces=False,
    )


def make_random_model(folder: str | Path, size: str, device: str = "cuda:0") -> Path:
    """Writes a random Qwen2 of a size in `SIZES` and its tokenizer."""
    tokenizer = make_large_tokenizer()
    config = Qwen2Config(
        **SIZES[size],
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(previous)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return Path(folder)


def random_model(folder: Path, size: str, gpu: int) -> Path:
    """The model in ``folder``, made if it is not there."""
    if not (folder / "tokenizer.json").exists():
        make_random_model(folder, size, f"cuda:{gpu}")
    return folder
