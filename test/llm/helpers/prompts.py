"""Prompts that several files of tests use."""

from __future__ import annotations

PROMPTS = [[5, 6, 7], [300, 301, 302, 303], list(range(40, 60))]
EIGHT_PROMPTS = [[i, 2 * i + 3, 77, 100 + i] for i in range(8)]
LORA_PROMPTS = [[5, 6, 7, 8], [20, 21, 22], [40, 41, 42, 43, 44]]
QUESTIONS = ["the quick", "hello", "a policy acts, the environment answers", "no", "42", "hm?"]
