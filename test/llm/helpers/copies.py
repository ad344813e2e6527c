"""What a child does with its copy of a service; a spawned one has to find this by its name."""

from __future__ import annotations

import pickle
from typing import Any


def generate_in_child(payload: bytes, answers: Any) -> None:
    external = pickle.loads(payload)
    sampling = {"max_new_tokens": 8, "temperature": 0.0}
    answers.put((external.generate([9, 8, 7], sampling).output_ids, repr(external)))
    external.shutdown()
