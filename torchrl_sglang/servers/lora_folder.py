"""Looks at a LoRA adapter's folder before a server reads it. Needs only the standard library.

SGLang 0.5.23 takes adapters that it can't compute with: some it computes wrongly, and some end the
server at the first request that names them. Both are found here, from the adapter's configuration
and the headers of its weights.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedOptionError
from .hosts import is_here

CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")

# Options that SGLang does not read, and the values at which that changes nothing.
NOT_READ: dict[str, tuple[Any, ...]] = {
    "use_rslora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "bias": (None, "none"),
}

LORA_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.\w+)*")
FUSED = {"q_proj", "k_proj", "v_proj"}

Shape = list[int]


def adapter_path(path: str | os.PathLike[str], server_urls: Sequence[str]) -> str:
    """What to tell the servers: the absolute path of a sound adapter's folder, or a hub name.

    Args:
        path: folder or hub name, as the user wrote it.
        server_urls: where the servers are. Servers on this machine see the folders that are here;
            for others, a folder that is not here is left to them.

    Raises:
        ConfigError: no folder, or one with no adapter or with a damaged one.
        UnsupportedOptionError: an adapter that SGLang would compute wrongly.
    """
    written = os.fspath(path)
    folder = Path(written).expanduser()
    if written and folder.is_dir():
        check_folder(folder)
        return os.path.abspath(folder)
    written_as_path = written.startswith((".", "/", "~")) or written.count("/") != 1
    if not isinstance(path, str) or (written_as_path and all(map(is_here, server_urls))):
        raise ConfigError(f"there is no folder {written!r} to load an adapter from.")
    return written


def check_folder(folder: Path) -> None:
    """Raises what is wrong with an adapter; errors as in `adapter_path`."""
    config = _read_config(folder)
    unread = find_unread(config)
    if unread is not None:
        raise UnsupportedOptionError(
            f"the adapter in {str(folder)!r} has {unread}={config[unread]!r}, which SGLang "
            "does not read: it would generate as if it were not there."
        )
    if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        raise ConfigError(f"the folder {str(folder)!r} has no weights of an adapter.")
    shapes: dict[str, Shape] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= read_shapes(file)
    if shapes:  # older formats can't be read without running them
        problem = find_problem(shapes, config["r"])
        if problem:
            raise ConfigError(f"the adapter in {str(folder)!r} can't be served: {problem}.")


def find_unread(
    config: Mapping[str, Any], options: Mapping[str, tuple[Any, ...]] = NOT_READ
) -> str | None:
    """The first option that SGLang does not read and that changes what an adapter computes."""
    return next((o for o, harmless in options.items() if config.get(o) not in harmless), None)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(f"the folder {str(folder)!r} has no {CONFIG}: it is no LoRA adapter.")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{str(file)!r} can't be read: {error}") from error
    if not isinstance(config, dict) or str(config.get("peft_type")).lower() != "lora":
        raise ConfigError(f"{str(file)!r} has no peft_type='LORA': it is no LoRA adapter.")
    if not isinstance(config.get("r"), int):
        raise ConfigError(f"{str(file)!r} has no rank: r={config.get('r')!r}.")
    return config


def read_shapes(file: Path) -> dict[str, Shape]:
    """Names and shapes in a safetensors file, from its header.

    Raises:
        ConfigError: it is no such file, or cut off.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            present = os.fstat(stream.fileno()).st_size - 8 - length
            if present < 0:
                raise ValueError("it ends within its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        if present < max((tensor["data_offsets"][1] for tensor in header.values()), default=0):
            raise ValueError("it ends within its weights")
        return {name: tensor["shape"] for name, tensor in header.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{str(file)!r} is no whole safetensors file: {error}") from error


def find_problem(shapes: Mapping[str, Shape], rank: int) -> str | None:
    """Why SGLang can't compute with such weights; None if it can.

    Args:
        shapes: shape of each weight, by name.
        rank: the configuration's ``r``.
    """
    sides: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        match = LORA_WEIGHT.fullmatch(name)
        if match is None:
            if "embed_tokens" in name or "lm_head" in name:
                continue  # PEFT saves the base model's own beside an adapter of embeddings
            return f"{name!r} is no weight of LoRA, and SGLang would leave it out"
        sides.setdefault(match["module"], set()).add(match["side"])
        found = shape[0] if match["side"] == "A" else shape[-1]
        if len(shape) == 2 and found != rank:
            return f"{name!r} has rank {found}, the configuration says r={rank}"
    halves = [module for module, found in sides.items() if len(found) == 1]
    if halves:
        return f"{halves[0]!r} has lora_A or lora_B, but not both"
    return _fused_problem(sides)


def _fused_problem(modules: Mapping[str, object]) -> str | None:
    """SGLang fuses q, k and v; it fills in k where that is missing, but neither q nor v."""
    blocks: dict[str, set[str]] = {}
    for module in modules:
        block, _, leaf = module.rpartition(".")
        if leaf in FUSED:
            blocks.setdefault(block, set()).add(leaf)
    for block, leaves in blocks.items():
        if not {"q_proj", "v_proj"} <= leaves:
            return (
                f"{block!r} has {' and '.join(sorted(leaves))} alone, and SGLang needs q_proj and "
                "v_proj together; train both, or add zeros for the one that is missing"
            )
    return None
