"""Media reach a server through the router, or are refused by a model that has no use for them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest
import requests
from tensordict import NonTensorData, TensorDict, lazy_stack

from helpers.fault_proxy import FaultProxy
from helpers.media import chats, policy_of, said, texts
from torchrl_sglang import AsyncSGLang, GenerateRequest
from torchrl_sglang.config import RouterConfig
from torchrl_sglang.errors import InputError, UnsupportedOptionError
from torchrl_sglang.generate.request import Media
from torchrl_sglang.launch.commands import router_argv
from torchrl_sglang.launch.ports import PortReservation


def test_the_router_passes_media_on(proxy: FaultProxy, service: AsyncSGLang) -> None:
    """In both shapes: those of one prompt, and those of several prompts."""
    with PortReservation() as own, PortReservation() as metrics:
        argv = router_argv(
            RouterConfig(),
            python=sys.executable,
            port=own.port,
            prometheus_port=metrics.port,
            worker_urls=[proxy.url],
            api_key=service.api_key,
        )
    url = f"http://127.0.0.1:{own.port}/generate"
    key = {"Authorization": f"Bearer {service.api_key}"}
    flat = {"image_data": ["a", "b"], "video_data": ["v"], "audio_data": ["s"]}
    nested = {name: [names] for name, names in flat.items()}
    log = subprocess.DEVNULL
    with subprocess.Popen(argv, stdout=log, stderr=log) as router:
        try:
            wait_for(url.replace("generate", "readiness"))
            for media, count in ((flat, 1), (nested, 2)):
                sampling = {"max_new_tokens": 1, "n": count}
                body = {"input_ids": [5, 6, 7], "sampling_params": sampling, **media}
                assert requests.post(url, json=body, headers=key, timeout=20).ok
                arrived = json.loads(
                    next(seen for path, seen in reversed(proxy.seen) if path == "/generate")
                )
                assert {name: arrived.get(name) for name in media} == media
        finally:
            router.kill()


def wait_for(url: str) -> None:
    """Returns when something answers there."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(url, timeout=5).ok:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


@pytest.mark.parametrize(
    ("media", "match"),
    [
        (Media(images=("a",)), "images or videos are given"),
        (Media(videos=("a",)), "images or videos are given"),
        (Media(audios=("a",)), "audio is given"),
    ],
)
def test_a_model_refuses_what_it_does_not_understand(
    service: AsyncSGLang, media: Media, match: str
) -> None:
    assert not service.info.features.images
    assert not service.info.features.audio
    request = GenerateRequest(input_ids=[5, 6], media=media)
    with pytest.raises(UnsupportedOptionError, match=match):
        service.generate(request)


def test_a_text_model_refuses_media_of_chats_and_rows(service: AsyncSGLang) -> None:
    content = [{"type": "image", "image": "a.png"}, said("what?")]
    with pytest.raises(UnsupportedOptionError, match="reads text only"):
        policy_of(service)(chats(content))
    with pytest.raises(InputError, match="list of parts"):
        policy_of(service, chat_template=None)(chats(content))
    td = texts("<image> a")
    td["sampling"] = lazy_stack([TensorDict(audios=NonTensorData("s.wav"))])
    with pytest.raises(UnsupportedOptionError, match="does not hear"):
        policy_of(service, input_mode="text")(td)
