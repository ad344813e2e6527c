"""Lets the ranks of a trainer talk to each other, in the trainer's own group."""

from __future__ import annotations

from typing import Any

from torch.distributed.distributed_c10d import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    get_world_size,
    is_initialized,
)


def trainer_rank() -> int:
    """This process's rank among those that train together; 0 where it trains alone."""
    return get_rank() if is_initialized() else 0


def say(message: tuple[Any, ...]) -> None:
    """From the trainer's rank 0 to its other ranks."""
    broadcast_object_list([message], src=0)


def gathered(answer: Any) -> list[Any]:
    """What every rank of the trainer answers, in their order; all ranks have to call it."""
    if not is_initialized():
        return [answer]
    answers: list[Any] = [None] * get_world_size()
    all_gather_object(answers, answer)
    return answers


def hear() -> tuple[Any, ...]:
    """What rank 0 says."""
    heard: list[Any] = [None]
    broadcast_object_list(heard, src=0)
    message: tuple[Any, ...] = heard[0]
    return message
