"""Makes the version of each token, and of a row, from the spans of a completion."""

from __future__ import annotations

import torch

from ...generate.completion import NO_VERSION, Completion, version_number


def row_version(completion: Completion) -> torch.Tensor:
    """The version that sampled the last token, int64 ``[]``.

    A row that was aborted in the server's queue may name a version that sampled nothing.
    """
    version = completion.weight_version if completion.output_ids else None
    return as_count(NO_VERSION if version is None else version_number(version))


def as_count(number: int) -> torch.Tensor:
    """A number, int64 ``[]``."""
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def token_versions(completion: Completion) -> torch.Tensor:
    """The version that sampled each token, int64 ``[R]``."""
    if len(completion.version_spans) == 1:
        number = version_number(completion.version_spans[0].version)
        return torch.full((len(completion.output_ids),), number, dtype=torch.int64, device="cpu")
    versions = torch.empty(len(completion.output_ids), dtype=torch.int64, device="cpu")
    for span in completion.version_spans:
        versions[span.start : span.end] = version_number(span.version)
    return versions
