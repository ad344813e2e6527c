"""The size of the served model's vocabulary, and the refusal of ids beyond it.

SGLang up to 0.5.23 checks neither a prompt's ids, nor stop ids, nor how many log-probs are asked
for: one request beyond the vocabulary ends the whole server, and every request that it holds.
Needs only the standard library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError, UnsupportedOptionError
from .protocol import GenerateRequest

# No route tells the size, but the refusal of a bias does, before the scheduler hears of the
# request. A server that took it would add 0 to the last logit, and generate nothing.
QUESTION = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0, "logit_bias": {"-1": 0.0}}}
ANSWER = re.compile(r"keys in \[0, (\d+)\]")


def told_vocab_size(refusal: str) -> int | None:
    """The size that a server's answer to `QUESTION` tells; None where it tells none."""
    said = ANSWER.search(refusal)
    return None if said is None else int(said[1]) + 1


def configured_vocab_size(path: Path) -> int | None:
    """The size in a model's ``config.json``; None where the file can't be read or has none."""
    try:
        config = json.loads(path.read_text())
        size = config.get("text_config", config)["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def configured_eos_ids(folder: Path) -> tuple[int, ...] | None:
    """The ids at which SGLang ends a row, from a model's folder; None where it does not tell.

    A ``config.json`` without an ``eos_token_id`` leaves it to the model's class.
    """
    try:
        given = [json.loads((folder / "config.json").read_text())["eos_token_id"]]
        generation = folder / "generation_config.json"
        if generation.is_file():
            given.append(json.loads(generation.read_text()).get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    ids = [each for part in given for each in (part if isinstance(part, list) else [part])]
    return tuple(sorted({each for each in ids if isinstance(each, int)}))


def check_ids(batch: Sequence[GenerateRequest], size: int | None) -> None:
    """Raises for ids outside of a vocabulary of ``size`` ids; None: it is not known.

    Raises:
        InputError: an id of a prompt. With media only a negative one: the placeholders of some
            models lie beyond the vocabulary.
        UnsupportedOptionError: a stop id, a biased id, or more log-probs than there are ids.
    """
    for index, request in enumerate(batch):
        ids = request.input_ids or (0,)
        lowest, highest = min(ids), max(ids)
        beyond = size is not None and highest >= size and request.media is None
        if lowest < 0 or beyond:
            wrong = lowest if lowest < 0 else highest
            known = "" if size is None else f", which has ids from 0 to {size - 1}"
            raise InputError(
                f"prompt {index} has the id {wrong}, at position {ids.index(wrong)}: it is outside "
                f"of the model's vocabulary{known}. Was it made with another tokenizer, or padded?"
            )
        if size is not None:
            _check_options(index, request, size)


def _check_options(index: int, request: GenerateRequest, size: int) -> None:
    sampling, asked = request.sampling, request.returns.top_log_probs
    for name, ids in (
        # Also without min_new_tokens: another request of the server's batch may have it.
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias or ()),
    ):
        wrong = max(ids, default=0)
        if wrong >= size:
            raise UnsupportedOptionError(
                f"prompt {index}: {name} has the id {wrong}, which is outside of the model's "
                f"vocabulary: it has ids from 0 to {size - 1}."
            )
    if asked > size:
        raise UnsupportedOptionError(
            f"prompt {index}: top_log_probs={asked}, but the model's vocabulary has {size} ids."
        )
