"""A task that a random model can learn in minutes and that a few lines of code can verify.

The prompt asks for one kind of character ("Write digits only.") and the reward is the share of
the answer's tokens that are of this kind. The kinds exclude each other, so an answer that
ignores the prompt scores at most ``1 / len(KINDS)`` on average.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

KINDS: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: text.isascii() and text.isdigit(),
    "capitals": lambda text: text.isascii() and text.isalpha() and text.isupper(),
    "lowercase": lambda text: text.isascii() and text.isalpha() and text.islower(),
    "punctuation": lambda text: bool(text) and all(sign in string.punctuation for sign in text),
}

NUM_TOKENS = 16  # that an answer may have
MAX_REPEATS = 4  # of one token that count

TRAIN_PHRASES = (
    "Write {} only.",
    "Answer with {} only.",
    "Please reply with {}.",
    "Use {} and nothing else.",
    "Only {}, please.",
    "I want to read {} from you.",
    "What I ask for is {}.",
    "Your answer is made of {}.",
    "Give me {}!",
    "Can you write {}?",
    "{} is what I need.",
    "Show me a short line of {}.",
    "No other signs than {}.",
    "The text should be all {}.",
    "This time, {}.",
    "{}, and only that.",
)

# Never trained on: the model has to find the kind in a sentence that it has not seen.
HELD_OUT_PHRASES = (
    "Let the reply be {}.",
    "Today I read {} and nothing else.",
    "Now {}, please!",
    "{}: that is the question, answer it.",
    "Is there a line of {} for me?",
    "Stop here and write {} for the user.",
)


@dataclass(frozen=True)
class Question:
    """One prompt and the kind of character that it asks for."""

    prompt: str
    kind: str


def make_questions(phrases: Sequence[str]) -> list[Question]:
    """Every phrase with every kind: the kinds are equally frequent."""
    return [Question(phrase.format(kind), kind) for phrase in phrases for kind in KINDS]


def score(tokens: Sequence[str], kind: str) -> float:
    """The share of the ``NUM_TOKENS`` tokens that are of the kind asked for, from 0 to 1.

    ``tokens`` are the answer's tokens, each decoded on its own; the spaces around them don't
    count. Only ``MAX_REPEATS`` of the same token do, so writing one over and over scores little,
    and so does an answer that ends early.
    """
    is_right = KINDS[kind]
    counts = Counter(token.strip() for token in tokens)
    num_right = sum(min(n, MAX_REPEATS) for token, n in counts.items() if is_right(token))
    return num_right / NUM_TOKENS
