"""The exception tree is what its drawing says, and survives the way between processes."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re

import pytest

from torchrl_sglang import errors
from torchrl_sglang.errors import (
    EngineLostError,
    HTTPAnswerError,
    ProcessDiedError,
    PushError,
    PushTimeoutError,
    RequestRefusedError,
    ServerFailedError,
    SGLangError,
)

LINE = re.compile(r"^    (?P<rail>[│ ├└─]*)(?P<name>[A-Z]\w+)(?: \((?P<builtin>\w+)\))?", re.M)

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception)
}

# Shared behaviour of three others; nobody is meant to catch it, so it is not drawn.
NOT_DRAWN = {"HTTPAnswerError"}


def drawn() -> list[tuple[str, str | None, str | None]]:
    """Name, parent and builtin of each line of the drawing."""
    found, path = [], []
    for line in LINE.finditer(errors.__doc__ or ""):
        depth = len(line["rail"]) // 4
        path[depth:] = [line["name"]]
        found.append((line["name"], path[depth - 1] if depth else None, line["builtin"]))
    return found


DRAWN = drawn()


def test_every_error_is_drawn_once() -> None:
    names = [name for name, _, _ in DRAWN]
    assert sorted([*names, *NOT_DRAWN]) == sorted(CLASSES)


@pytest.mark.parametrize(("name", "parent", "builtin"), DRAWN)
def test_the_drawing(name: str, parent: str | None, builtin: str | None) -> None:
    kind = CLASSES[name]
    assert issubclass(kind, SGLangError)
    assert kind.__doc__
    if parent is not None:
        nearest = next(k for k in kind.__mro__[1:] if k.__name__ in CLASSES.keys() - NOT_DRAWN)
        assert nearest is CLASSES[parent]
    direct = {base for base in kind.__bases__ if base.__module__ == "builtins"} - {Exception}
    assert direct == ({getattr(builtins, builtin)} if builtin else set())


MADE: dict[str, Exception] = {
    "ProcessDiedError": ProcessDiedError("server-0", ["python", "-m", "x"], -9, "last line"),
    "PushError": PushError("refused", step="announce", engine="http://e", bucket=3),
    "PushTimeoutError": PushTimeoutError("late", step="init"),
    "EngineLostError": EngineLostError("gone", step="transfer", engine="http://e", bucket=0),
    "HTTPAnswerError": HTTPAnswerError("said no", status=404, body="{}"),
    "RequestRefusedError": RequestRefusedError("said no", status=400, body="{}"),
    "ServerFailedError": ServerFailedError("cut"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_pickle_keeps_type_message_and_attributes(name: str) -> None:
    error = MADE.get(name) or CLASSES[name]("what happened")
    error.add_note("prompt 3 of the batch")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) != ""
    assert vars(copy) == vars(error)
    assert copy.__notes__ == ["prompt 3 of the batch"]


def test_a_dead_process_says_everything() -> None:
    error = ProcessDiedError("server-0", ["python", "-m", "x"], -9, "out of memory")
    for part in ("server-0", "exit code -9", "command: python -m x", "out of memory"):
        assert part in str(error)
    assert (error.argv, error.exit_code, error.log_tail) == (
        ("python", "-m", "x"),
        -9,
        "out of memory",
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PushError("no", step="pause"), "weight push failed at step 'pause', trainer: no"),
        (
            PushError("no", step="announce", engine="http://e", bucket=0),
            "weight push failed at step 'announce', bucket 0, engine http://e: no",
        ),
    ],
)
def test_a_push_error_says_where(error: PushError, expected: str) -> None:
    assert str(error) == expected
