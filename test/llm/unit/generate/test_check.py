"""What servers can not do or do not know is refused before it is sent."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.vocabulary import DEADLY, request
from torchrl_sglang import GenerateRequest, SamplingParams
from torchrl_sglang.errors import InputError, UnsupportedOptionError
from torchrl_sglang.generate.check import check_features, check_ids
from torchrl_sglang.generate.request import Media
from torchrl_sglang.servers.info import Features

SIZE = 512  # of the model that the shared server runs


@pytest.mark.parametrize("changes", [case[0] for case in DEADLY[:1] + DEADLY[2:]])
def test_a_vocabulary_that_is_not_known(changes: dict[str, Any]) -> None:
    check_ids([request(**changes)], None)


def test_negative_ids_are_wrong_in_every_vocabulary() -> None:
    with pytest.raises(InputError, match=r"has the id -1, at position 2: .* vocabulary\. Was"):
        check_ids([request(input_ids=(5, 6, -1))], None)


def test_placeholders_of_media_may_lie_beyond() -> None:
    """As in Llama 3.2 Vision, whose image token is the first id after its vocabulary."""
    image = Media(images=("http://host/a.png",))
    check_ids([request(input_ids=(5, SIZE), media=image)], SIZE)
    with pytest.raises(InputError, match="prompt 0 has the id -1"):
        check_ids([request(input_ids=(5, -1), media=image)], SIZE)


def test_min_p_where_seeds_are_used() -> None:
    """SGLang's sampler has an assertion against the two, which ends the server."""
    request = GenerateRequest(input_ids=(5,), sampling=SamplingParams(min_p=0.1))
    check_features(request, Features())
    with pytest.raises(UnsupportedOptionError, match="min_p"):
        check_features(request, Features(deterministic=True))
