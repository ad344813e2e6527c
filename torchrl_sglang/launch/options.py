"""Knows what options are called: in SGLang, in vLLM, and on this library's own calls."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UnsupportedOptionError

# Other names of SGLang's options: vLLM's, and short forms. Where the value says the opposite, the
# name here begins with "not".
SYNONYMS = {
    "max_model_len": "context_length",
    "gpu_memory_utilization": "mem_fraction_static",
    "seed": "random_seed",
    "max_num_seqs": "max_running_requests",
    "max_num_batched_tokens": "chunked_prefill_size",
    "enforce_eager": "disable_cuda_graph",
    "enable_prefix_caching": "not disable_radix_cache",
    "enable_fp32_output": "enable_fp32_lm_head",
    "block_size": "page_size",
    "max_loras": "max_loras_per_batch",
    "tokenizer": "tokenizer_path",
    "tensor_parallel_size": "tp_size",
    "tp": "tp_size",
    "num_devices": "tp_size",
    "data_parallel_size": "dp_size",
    "dp": "dp_size",
    "pipeline_parallel_size": "pp_size",
    "pp": "pp_size",
    "expert_parallel_size": "ep_size",
    "ep": "ep_size",
    "devices": "cuda_devices",
}


def in_our_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names that SGLang, or this library's own calls, have for them.

    Args:
        options: as they were given; None leaves one out.

    Raises:
        ConfigError: one option was given twice, by two of its names.
    """
    named: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for given, value in options.items():
        inverse, _, name = SYNONYMS.get(given, given).rpartition(" ")
        if inverse and not isinstance(value, bool | None):
            raise ConfigError(f"{given} must be True or False, got {value!r}.")
        if name in spelled:
            raise ConfigError(f"{spelled[name]}= and {given}= are two names of one option.")
        spelled[name] = given
        named[name] = not value if inverse and value is not None else value
    return named


@dataclass(frozen=True, kw_only=True)
class KnownOptions:
    """The options of an installed SGLang, or router.

    Attributes:
        names: what they are called; none where that can't be found out.
        negatable: those that are switched off by a ``--no-`` form.
    """

    names: frozenset[str] = frozenset()
    negatable: frozenset[str] = frozenset()

    def checked(self, given: Mapping[str, Any], program: str) -> dict[str, Any]:
        """The options, with False said by the ``--no-`` form where there is one.

        Args:
            given: as in ``ServerConfig.extra_args``.
            program: what messages call it.

        Raises:
            UnsupportedOptionError: one that it does not know; names the nearest.
        """
        for name in given:
            if self.names and not self._knows(name):
                raise UnsupportedOptionError(
                    f"{program}, as it is installed, has no option {name!r}{self._nearest(name)}. "
                    "Its --help lists all that it has."
                )
        switched_off = {n for n, v in given.items() if v is False and n in self.negatable}
        return {
            f"no_{name}" if name in switched_off else name: name in switched_off or value
            for name, value in given.items()
        }

    def _knows(self, name: str) -> bool:
        name = name.replace("-", "_")
        return (
            name in self.names
            or (name.startswith("no_") and name[3:] in self.negatable)
            or any(known.startswith(name) for known in self.names)  # argparse takes beginnings
        )

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names | SYNONYMS.keys(), n=3)
        return f" (do you mean {' or '.join(near)}?)" if near else ""
