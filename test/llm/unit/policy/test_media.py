"""Images, videos and audio: from a TensorDict to the fields of SGLang's own request."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from helpers.media import chats, policy_of, said, texts
from helpers.servers import CPU_SERVER_ARGS
from torchrl_sglang import Completion, GenerateRequest, SamplingParams
from torchrl_sglang.errors import ConfigError, InputError, UnsupportedOptionError
from torchrl_sglang.generate.check import check_features
from torchrl_sglang.generate.completion import VersionSpan
from torchrl_sglang.generate.request import Media, passes_router
from torchrl_sglang.launch.commands import CPU_SERVE
from torchrl_sglang.servers.info import Features

PNG = "data:image/png;base64,iVBORw0KGgo="

INLINE = "data:application/octet-stream;base64,"


# The parts of a message, what the prompt says of them, and what SGLang is to get.
PARTS: list[tuple[list[dict[str, Any]], str, dict[str, list[str]]]] = [
    ([{"type": "image", "image": "a.png"}, said("what?")], "<image>what?", {"image": ["a.png"]}),
    ([said("a"), {"type": "image", "url": "http://x/a.png"}], "a<image>", {"image": ["http://x/a.png"]}),
    ([{"type": "image", "path": "/b/a.png"}], "<image>", {"image": ["/b/a.png"]}),
    ([{"type": "image", "base64": "iVBO"}], "<image>", {"image": [INLINE + "iVBO"]}),
    ([{"type": "image", "base64": PNG}], "<image>", {"image": [PNG]}),
    ([{"type": "video", "video": "v.mp4"}, said("?")], "<video>?", {"video": ["v.mp4"]}),
    ([{"type": "audio", "audio": "s.wav"}], "<audio>", {"audio": ["s.wav"]}),
    ([{"type": "audio", "base64": "UklG"}], "<audio>", {"audio": [INLINE + "UklG"]}),
    (
        [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}, said("?")],
        "<image>?",
        {"image": [PNG]},
    ),
    ([{"type": "image_url", "image_url": "http://x/a"}], "<image>", {"image": ["http://x/a"]}),
    ([{"type": "video_url", "video_url": {"url": "http://x/v"}}], "<video>", {"video": ["http://x/v"]}),
    ([{"type": "audio_url", "audio_url": {"url": "http://x/s"}}], "<audio>", {"audio": ["http://x/s"]}),
    (
        [{"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}],
        "<audio>",
        {"audio": [INLINE + "UklG"]},
    ),
    (
        [
            {"type": "image", "image": "1"},
            {"type": "audio", "audio": "2"},
            said("and"),
            {"type": "image_url", "image_url": {"url": "3"}},
            {"type": "video", "url": "4"},
        ],
        "<image><audio>and<image><video>",
        {"image": ["1", "3"], "audio": ["2"], "video": ["4"]},
    ),
    ([said("text"), said(" alone")], "text alone", {}),
]  # fmt: skip


# Reads bodies and prints what SGLang makes of them: as a server does, before it tokenises.
NORMALIZE = """
import json, runpy, sys
runpy.run_path(sys.argv[1])
from sglang.srt.managers.io_struct import GenerateReqInput

print("ready", flush=True)
for line in sys.stdin:
    try:
        request = GenerateReqInput(**json.loads(line))
        request.normalize_batch_and_arguments()
        single = request.is_single
        each = [request] if single else [request[i] for i in range(len(request.input_ids))]
        answer = [
            {
                "input_ids": list(one.input_ids),
                "has_media": one.contains_mm_input(),
                **{name: getattr(one, name + "_data") for name in ("image", "video", "audio")},
            }
            for one in each
        ]
    except Exception as error:
        answer = repr(error)
    print("answer " + json.dumps(answer), flush=True)
"""


Normalize = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def normalize() -> Iterator[Normalize]:
    """SGLang's own reading of a body, in the environment of the servers."""
    python = CPU_SERVER_ARGS["server_python"] or sys.executable
    with subprocess.Popen(
        [python, "-W", "ignore", "-c", NORMALIZE, str(CPU_SERVE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:

        def said_next(word: str) -> str:
            for line in child.stdout or ():
                if line.startswith(word):
                    return line.removeprefix(word)
            raise AssertionError("the child has ended")

        def ask(body: dict[str, Any]) -> Any:
            assert child.stdin is not None
            child.stdin.write(json.dumps(body) + "\n")
            child.stdin.flush()
            return json.loads(said_next("answer "))

        try:
            said_next("ready")
            yield ask
        finally:
            child.kill()


class Recorder:
    """Stands for a service whose model sees and hears; keeps the requests and answers anything."""

    def __init__(self, model_path: Any, **features: Any) -> None:
        features = {"images": True, "audio": True, **features}
        self.info = SimpleNamespace(tokenizer_path=str(model_path), features=Features(**features))
        self.requests: list[GenerateRequest] = []

    def complete(self, requests: list[GenerateRequest], arrive: Any) -> list[Completion]:
        self.requests = requests
        completions = [
            Completion(
                rid=request.rid,
                output_ids=[50, 51],
                log_probs=[-1.0, -1.0],
                text=None,
                finish_type="length",
                matched_stop=None,
                prompt_tokens=1000,
                cached_tokens=0,
                version_spans=(VersionSpan(version="default", start=0, end=2),),
            )
            for request in requests
            for _ in range(request.num_samples)
        ]
        for request in requests:
            check_features(request, self.info.features)
        return completions

    def bodies(self) -> list[dict[str, Any]]:
        return [request.bodies(seeded=False) for request in self.requests]


@pytest.fixture
def seeing(model_path: Any) -> Recorder:
    return Recorder(model_path)


def fields(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given.get(name) for name in ("image", "video", "audio")}


def check(read: Any, request: GenerateRequest, media: dict[str, list[str]]) -> None:
    """One request as SGLang reads it."""
    assert read["input_ids"] == list(request.input_ids or ())
    assert read["has_media"] == bool(media)
    assert fields(read) == fields(media)


# History


def test_every_format_of_a_part(seeing: Recorder, normalize: Normalize) -> None:
    out = policy_of(seeing)(chats(*(parts for parts, _, _ in PARTS)))
    for row, request, body, (_, text, media) in zip(
        out.unbind(0), seeing.requests, seeing.bodies(), PARTS, strict=True
    ):
        assert row["text"].prompt == (
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        (read,) = normalize(body)
        check(read, request, media)


def test_plain_messages_beside_parts(seeing: Recorder, normalize: Normalize) -> None:
    """Rows of one batch, and messages of one chat, of either kind; the history keeps them."""
    image = [{"type": "image", "image": "a.png"}, said("what?")]
    rows = [
        [{"role": "system", "content": "be short"}, {"role": "user", "content": image}],
        [{"role": "user", "content": "plain"}],
        [
            {"role": "user", "content": image},
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": [said("and?"), {"type": "image", "image": "b.png"}]},
        ],
    ]
    histories = [History.from_chats([row])[0] for row in rows]
    td = lazy_stack(
        [TensorDict(history=ChatHistory(prompt=one, batch_size=())) for one in histories]
    )
    out = policy_of(seeing)(td)
    for body, request, media in zip(
        seeing.bodies(),
        seeing.requests,
        ({"image": ["a.png"]}, {}, {"image": ["a.png", "b.png"]}),
        strict=True,
    ):
        check(normalize(body)[0], request, media)
    for row, chat in zip(out.unbind(0), rows, strict=True):
        full = row["history"].full
        assert full.role == [*(message["role"] for message in chat), "assistant"]
        kept = full.view(-1).tolist(tolist_first=True)
        assert [message["content"] for message in kept[:-1]] == [m["content"] for m in chat]


def test_a_history_made_by_hand(seeing: Recorder) -> None:
    history = History(
        role=["user"], content=[[{"type": "image", "image": "a.png"}]], batch_size=(1,)
    )
    policy_of(seeing)(TensorDict(history=ChatHistory(prompt=history, batch_size=())))
    assert seeing.requests[0].media == Media(images=("a.png",))


def test_the_next_turn_carries_the_media_again(seeing: Recorder) -> None:
    policy = policy_of(seeing)
    first = policy(chats([{"type": "image", "image": "a.png"}, said("what?")]))[0]
    more = first["history"].full.append(History(role="user", content="and?", batch_size=()))
    td = TensorDict(history=ChatHistory(prompt=more[None], batch_size=1), batch_size=1)
    prompt = policy(td)[0]["tokens"].prompt.tolist()
    assert prompt[: len(first["tokens"].full)] == first["tokens"].full.tolist()
    assert seeing.requests[0].media == Media(images=("a.png",))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {}},
        {"type": "audio", "audio": 7},
        {"type": "input_audio", "input_audio": {"format": "wav"}},
    ],
    ids=str,
)
def test_a_part_that_holds_nothing(seeing: Recorder, part: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=part["type"]):
        policy_of(seeing)(chats([part]))
    assert seeing.requests == []


def test_a_template_that_writes_strings_only(seeing: Recorder) -> None:
    """Such templates fail with an error of Jinja's, or write the list as Python does."""
    printing = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for template in (None, printing):
        policy = policy_of(seeing, chat_template=template)
        with pytest.raises(InputError, match="list of parts"):
            policy(chats([said("hello")]))
        assert policy(chats("hello"))[0]["text"].prompt.count("hello") == 1


# Text, with options per row


def test_media_of_rows(seeing: Recorder, normalize: Normalize) -> None:
    td = texts("<image> a", "<image><image><video> b", "c <audio>", "d")
    td["sampling"] = lazy_stack(
        [
            TensorDict(images=NonTensorData("a.png"), temperature=torch.tensor(0.5)),
            TensorDict(images=NonTensorData(["b.png", "c.png"]), videos=NonTensorData(["v"])),
            TensorDict(audios=NonTensorData("s.wav")),
            TensorDict(images=NonTensorData([])),
        ]
    )
    policy_of(seeing, input_mode="text")(td)
    wanted: list[dict[str, list[str]]] = [
        {"image": ["a.png"]},
        {"image": ["b.png", "c.png"], "video": ["v"]},
        {"audio": ["s.wav"]},
        {},
    ]
    for body, request, media in zip(seeing.bodies(), seeing.requests, wanted, strict=True):
        check(normalize(body)[0], request, media)
    assert seeing.requests[0].sampling.temperature == 0.5


def test_one_name_for_each_row_of_a_stack(seeing: Recorder) -> None:
    td = texts("<image> a", "<image> b")
    td["sampling"] = TensorDict(images=NonTensorStack("a.png", "b.png"), batch_size=2)
    policy_of(seeing, input_mode="text")(td)
    assert [r.media for r in seeing.requests] == [
        Media(images=("a.png",)),
        Media(images=("b.png",)),
    ]


@pytest.mark.parametrize("value", [7, [7], "", ["a", ""]], ids=str)
def test_names_that_are_none(seeing: Recorder, value: Any) -> None:
    td = texts("<image> a")
    td["sampling"] = lazy_stack(
        [TensorDict(images=NonTensorData(value), videos=NonTensorData("v"))]
    )
    with pytest.raises(InputError, match="images=") as caught:
        policy_of(seeing, input_mode="text")(td)
    assert caught.value.__notes__ == ["row 0 of the batch"]


def test_media_in_messages_and_in_options(seeing: Recorder) -> None:
    td = chats([{"type": "image", "image": "a.png"}])
    td["sampling"] = lazy_stack([TensorDict(images=NonTensorData("b.png"))])
    with pytest.raises(InputError, match="leave one out"):
        policy_of(seeing)(td)


def test_not_in_a_session(seeing: Recorder) -> None:
    td = chats([{"type": "image", "image": "a.png"}])
    td["sampling"] = lazy_stack([TensorDict(session=NonTensorData("s"))])
    with pytest.raises(UnsupportedOptionError, match="session"):
        policy_of(seeing)(td)


def test_not_scored(seeing: Recorder) -> None:
    history = chats([{"type": "image", "image": "a.png"}])["history"].prompt
    td = TensorDict(history=ChatHistory(full=history, batch_size=1), batch_size=1)
    with pytest.raises(UnsupportedOptionError, match="scores text alone"):
        policy_of(seeing, generate=False)(td)
    td = texts("<image>")
    td["sampling"] = lazy_stack([TensorDict(images=NonTensorData("b.png"))])
    policy = policy_of(seeing, generate=False, input_mode="text", input_key=("text", "prompt"))
    with pytest.raises(UnsupportedOptionError, match="scores text alone"):
        policy(td)


# On the way to a server


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("form", ["own n", "batch"])
def test_several_samples(normalize: Normalize, form: str, count: int) -> None:
    """Every sample sees all images of its prompt, however the samples are asked for."""
    media = {name: [f"{name}{i}" for i in range(count)] for name in ("image", "video", "audio")}
    asked = GenerateRequest(
        input_ids=[5, 6, 7],
        sampling=SamplingParams(n=3),
        media=Media(**{f"{name}s": tuple(names) for name, names in media.items()}),
    )
    body = asked.bodies(seeded=form == "batch")
    assert passes_router(body) is (form == "own n")
    read = normalize(body)
    assert len(read) == 3, read
    for one in read:
        one |= {name: [one[name]] if isinstance(one[name], str) else one[name] for name in media}
        check(one, asked, media)


def test_a_model_that_sees_but_does_not_hear(model_path: Any) -> None:
    seeing = Recorder(model_path, audio=False)
    policy_of(seeing)(chats([{"type": "video", "video": "v"}]))
    with pytest.raises(ConfigError, match="does not hear"):
        policy_of(seeing)(chats([{"type": "audio", "audio": "s"}]))


@pytest.mark.parametrize("extra", ["input_log_probs", "routed_experts"])
@pytest.mark.parametrize("place", ["chat", "row"])
def test_what_would_not_line_up_with_the_prompt(model_path: Any, extra: str, place: str) -> None:
    """SGLang speaks of the expanded prompt, which has more tokens than ids were sent."""
    seeing = Recorder(model_path, routed_experts=True)
    td, mode = chats([{"type": "image", "image": "a.png"}, said("what?")]), "history"
    if place == "row":
        td, mode = texts("<image> a"), "text"
        td["sampling"] = lazy_stack([TensorDict(images=NonTensorData("a.png"))])
    words = extra.removeprefix("routed_").replace("experts", "routed experts")
    with pytest.raises(UnsupportedOptionError, match=f"{words} are asked for with images"):
        policy_of(seeing, input_mode=mode, extras=[extra])(td)
    policy_of(seeing, input_mode=mode)(td)
