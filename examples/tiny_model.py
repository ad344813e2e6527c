"""A tiny causal language model and its tokenizer, made from a seed: no download, no model hub.

The architecture is that of Qwen2.5 (tied embeddings, grouped-query attention) and so is the chat
format, so that whatever works with the tiny model works with a real one after changing the path.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"

# ChatML, as Qwen writes it. What stands between the `generation` tags is what the model itself
# has to write: `apply_chat_template(..., return_assistant_tokens_mask=True)` marks those tokens.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# How Qwen2 cuts a text into words before the merges. It has to be the same here: transformers gives
# every tokenizer that lies beside a Qwen2 model this one, whatever its file says.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = """\
system
user
assistant
system
user
assistant
You are a helpful assistant. Answer the question of the user, and answer it well.
The quick brown fox jumps over the lazy dog, and the dog does not mind.
Please write a short reply. What is the answer to this question? It is in the text above.
A policy acts, the environment answers with a reward, and the policy learns from both.
Use only the letters, the digits or the signs that you are asked for: nothing else, please.
ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN AND THE REST ARE LARGE
NO SMALL LETTER IS LEFT IN THIS LINE OR IN THE ONE ABOVE: STOP HERE, READ ON THERE
... --- !!! ??? ,,, ;;; ::: ((( ))) [[[ ]]] *** +++ === /// <<< >>> ### &&& %%% $$$ @@@ ~~~
?! !? () [] {} <> <- -> == != <= >= += -= *= /= // ** && || :: ;; .. :) :( ;) "" '' ``
"""


def make_tokenizer(corpus: str = CORPUS, *, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on ``corpus``, with ChatML's special tokens and a chat template.

    Every string can be encoded. The vocabulary holds at most ``vocab_size`` tokens, fewer if
    the corpus offers fewer merges.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, START_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[START_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    hidden_size: int = 256,
    intermediate_size: int = 512,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.02,
    logit_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Qwen2ForCausalLM:
    """Builds a randomly initialised Qwen2 model for ``tokenizer``; the seed decides every weight.

    ``logit_scale`` multiplies the logits. At 1 the next-token distribution of a random model is
    close to uniform, and hardly any comparison of log-probabilities can fail on it. At 4 the
    likeliest token has about half of the mass, as in a trained model; from 6 on, the model
    repeats itself. The random state of the caller is left alone.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    # The embeddings are tied, so it is the gain of the last norm that scales the logits alone.
    with torch.no_grad():
        model.model.norm.weight.mul_(logit_scale)
    model.generation_config = GenerationConfig(
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.to(dtype).eval()


def make_tiny_model(
    path: str | Path,
    *,
    seed: int = 0,
    corpus: str = CORPUS,
    vocab_size: int = 512,
    hidden_size: int = 256,
    intermediate_size: int = 512,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.02,
    logit_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a tiny model and its tokenizer to the folder ``path``, in Hugging Face's format.

    The same arguments always give the same files. Returns ``path``.
    """
    path = Path(path)
    tokenizer = make_tokenizer(corpus, vocab_size=vocab_size)
    model = make_model(
        tokenizer,
        seed=seed,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        logit_scale=logit_scale,
        dtype=dtype,
    )
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random model to a folder.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logit-scale", type=float, default=1.0)
    args = parser.parse_args()
    print(make_tiny_model(args.path, seed=args.seed, logit_scale=args.logit_scale))


if __name__ == "__main__":
    main()
