"""Tells which parts of the checkpoint's tensors a rank of a server holds: pure functions.

Names are the server's, ``model.layers.0.self_attn.qkv_proj.weight`` for instance; shapes are the
checkpoint's. Source: the weight loaders of SGLang's ``srt/layers/linear.py``,
``srt/layers/vocab_parallel_embedding.py`` and ``srt/layers/moe/fused_moe_triton/layer.py``
(0.5.23), as ``srt/models/llama.py``, ``qwen2.py``, ``qwen3.py`` and ``qwen3_moe.py`` use them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import count_of

# A fused parameter of the server, and the parameters that it is made of, in order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Of all the experts of a layer, or those that a rank has: theirs one after the other.
EXPERTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}
EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
KEY_VALUE = ("k_proj", "v_proj")
ROW_PARALLEL = (".o_proj.weight", ".down_proj.weight")  # divided by columns
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCAB_MULTIPLE = 64  # SGLang pads embeddings with zero rows to a multiple of this
CPU_MLP_MULTIPLE = 32  # on a CPU, it pads what a rank holds of an MLP to a multiple of this
# Families whose layout is the one described here, by the ``model_type`` of their configs.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# As above where ranks divide each expert, as they do unless SGLang is told otherwise: there are
# backends that reorder what they have loaded, and expert-parallel ranks have whole experts.
DIVIDED = FAMILIES | {"qwen3_moe"}

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads of a model, in all ranks together.

    Attributes:
        queries: ``num_attention_heads``.
        keys: ``num_key_value_heads``.
    """

    queries: int
    keys: int


def heads_of(config: Any) -> Heads | None:
    """Reads a Hugging Face config; None where it is None, or has no attention heads."""
    queries = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries=queries, keys=keys) if queries and keys else None


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One tensor-parallel rank of a server.

    Attributes:
        tp_rank: its number, from 0.
        tp_size: how many there are.
        heads: the model's; needed where ``tp_size`` is more than 1.
    """

    tp_rank: int
    tp_size: int
    heads: Heads | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """``tensor.narrow(dim, start, length)`` of one of the checkpoint's tensors."""

    name: str
    dim: int
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A parameter of a rank: slices one after the other along dim 0, then rows of zeros."""

    slices: tuple[Slice, ...]
    zero_rows: int = 0


def sources_of(server_name: str, known: Collection[str] = ()) -> list[str]:
    """The checkpoint's names behind one parameter of the server.

    Args:
        server_name: a name of the server's.
        known: names that were sent; a head that was not sent is tied to the embeddings.
    """
    if server_name == HEAD and EMBEDDING in known and HEAD not in known:
        return [EMBEDDING]
    prefix, _, leaf = server_name.rpartition(".experts.")
    if prefix and leaf in EXPERTS:
        return _of_experts(f"{prefix}.experts", EXPERTS[leaf], known) or [server_name]
    for fused, parts in FUSED.items():
        marker = f".{fused}."
        if marker in server_name:
            return [server_name.replace(marker, f".{part}.") for part in parts]
    return [server_name]


def _of_experts(prefix: str, parts: Sequence[str], known: Collection[str]) -> list[str]:
    """What was sent of the experts of a layer, by their numbers."""
    found: list[str] = []
    names = [f"{prefix}.0.{part}.weight" for part in parts]
    while any(name in known for name in names):
        found += names
        expert = len(found) // len(parts)
        names = [f"{prefix}.{expert}.{part}.weight" for part in parts]
    return found


def without_siblings(names: Iterable[str], whole: Iterable[str] = ()) -> list[str]:
    """Names that servers fuse with others, of which not all are there.

    Args:
        names: what was sent.
        whole: all that there is of the model.
    """
    known = set(names)
    lacking = {match[1] for name in {*whole} - known if (match := EXPERT.match(name))}
    return sorted(
        name for name in known if (match := EXPERT.match(name)) and match[1] in lacking
    ) or sorted(
        name
        for name in known
        for parts in FUSED.values()
        for part in parts
        if f".{part}." in name
        and not known.issuperset(name.replace(f".{part}.", f".{other}.") for other in parts)
    )


def shard_of(server_name: str, shapes: Shapes, rank: Rank) -> Shard:
    """What a rank holds under ``server_name``.

    Args:
        server_name: the server's name of a parameter that `why_unknown` has no objection to.
        shapes: names and shapes of what was sent.
        rank: whose.

    Raises:
        KeyError: a part was not sent.
    """
    parts = sources_of(server_name, shapes)
    if server_name in (EMBEDDING, HEAD):
        return _vocab_shard(parts[0], shapes[parts[0]][0], rank)
    if parts[0].endswith(ROW_PARALLEL) and rank.tp_size > 1:
        return Shard(slices=tuple(_columns(part, shapes[part][1], rank) for part in parts))
    if parts != [server_name]:
        return Shard(slices=tuple(_rows(part, shapes[part][0], rank) for part in parts))
    name, shape = server_name, shapes[server_name]
    return Shard(slices=(Slice(name=name, dim=0, start=0, length=shape[0] if shape else 1),))


def _rows(name: str, num_rows: int, rank: Rank) -> Slice:
    """The rows of one part of a fused parameter; heads of keys and values may be repeated."""
    index, count = rank.tp_rank, rank.tp_size
    if name.rsplit(".", 2)[-2] in KEY_VALUE and rank.heads and rank.heads.keys < count:
        index, count = index * rank.heads.keys // count, rank.heads.keys
    return Slice(name=name, dim=0, start=index * (num_rows // count), length=num_rows // count)


def _columns(name: str, num_columns: int, rank: Rank) -> Slice:
    held = num_columns // rank.tp_size
    return Slice(name=name, dim=1, start=rank.tp_rank * held, length=held)


def _vocab_shard(name: str, num_rows: int, rank: Rank) -> Shard:
    """A rank's rows of an embedding, of which the last ranks' are zeros in part or altogether."""
    multiple = VOCAB_MULTIPLE
    if _padded(num_rows, multiple) % rank.tp_size:
        multiple *= rank.tp_size
    held = _padded(num_rows, multiple) // rank.tp_size
    start = min(rank.tp_rank * held, num_rows)
    length = min(start + held, num_rows) - start
    return Shard(
        slices=(Slice(name=name, dim=0, start=start, length=length),), zero_rows=held - length
    )


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _parts(server_names: Iterable[str], shapes: Shapes) -> set[str]:
    return {part for name in server_names for part in sources_of(name, shapes)}


def ignored(server_names: Iterable[str], shapes: Shapes) -> list[str]:
    """What was sent and is part of nothing that a server hashes, if it hashes nothing else."""
    theirs = _parts(server_names, shapes)
    return sorted(set(shapes) - theirs) if theirs <= set(shapes) else []


def why_unknown(
    server_names: Iterable[str],
    shapes: Shapes,
    *,
    family: str | None,
    tp_size: int,
    heads: Heads | None = None,
    on_cpu: bool = False,
) -> str | None:
    """Why `shard_of` does not tell what a server holds; None if it does.

    At ``tp_size`` 1 the names alone decide. A family that is not in `FAMILIES` may still differ
    there (a loader may reorder rows), so for it equal checksums prove, and others prove nothing.

    Args:
        server_names: the parameters that one rank of the server hashed.
        shapes: names and shapes of what was sent.
        family: ``model_type`` of the served model.
        tp_size: ranks of the server.
        heads: the model's attention heads, if they are known.
        on_cpu: the server runs on a CPU.
    """
    theirs = _parts(server_names, shapes)
    strange = sorted(theirs - set(shapes))
    if strange:
        return f"the servers hash {count_of(len(strange), 'parameter')} not sent: {strange[0]}, ..."
    missing = sorted(set(shapes) - theirs)
    if missing or not theirs:
        return (
            f"the servers hash nothing of {count_of(len(missing), 'parameter')}: "
            f"{(missing or ['all'])[0]}, ..."
        )
    if tp_size == 1:
        return None
    if family not in DIVIDED:
        return f"how SGLang divides a {family!r} model among ranks is not known here"
    if heads is None:
        return "the served model's config, which counts its attention heads, can't be loaded here"
    return _why_indivisible(shapes, heads, tp_size, on_cpu)


def _why_indivisible(shapes: Shapes, heads: Heads, tp_size: int, on_cpu: bool) -> str | None:
    """The part of `why_unknown` about sizes; SGLang pads on a CPU, and elsewhere does not start."""
    repeats = not on_cpu and heads.keys < tp_size and tp_size % heads.keys == 0
    if heads.queries % tp_size or (heads.keys % tp_size and not repeats):
        return f"{heads} are not divisible by tp_size={tp_size}"
    multiple = tp_size * (CPU_MLP_MULTIPLE if on_cpu else 1)
    for name, shape in shapes.items():
        if name.endswith(".down_proj.weight") and shape[1] % multiple:
            return f"{shape[1]}, the intermediate size, is not divisible by {multiple}"
    return None
