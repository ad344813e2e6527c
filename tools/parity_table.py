"""Compares TransformersWrapper with SGLangWrapper, field by field, for docs/source/parity.rst.

Both run the same tiny model on the same prompts, greedily, in every mode and layout. What differs
has to be explained by a note, and each note says of the values themselves what it claims.

    .venv/bin/python tools/parity_table.py    # starts a server, and writes the page
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens, TransformersWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from torchrl_sglang import AsyncSGLang, SGLangWrapper

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/source/parity.rst"

QUESTIONS = ("the quick", "hello", "a policy acts, the environment answers", "no")
ANSWERS = ("brown fox", "well", "with a reward", "yes, and more")
MODES = ("history", "text", "tokens")
MOST, EOS, PAD = 6, 2, 0
# Lengths of the answers, EOS included; None: as long as it may be. One row is led to a word.
ENDS = (4, 3, None, 2)
LED, LED_TO = 1, " the"
TOLERANCE = 0.1  # of log-probs: their head computes in bf16, ours in float32
FIELDS = {
    "text": ("prompt", "response", "full"),
    "tokens": ("prompt", "response", "full", "padded"),
    "masks": ("all_attention_mask", "all_assistant_mask", "padded"),
    "log_probs": ("prompt", "response", "full", "padded"),
    "history": ("prompt", "response", "full"),
}


@dataclass(frozen=True)
class Case:
    """One way to call both wrappers."""

    mode: str
    generate: bool
    padded: bool
    samples: int | None = None

    @property
    def title(self) -> str:
        words = ["padded" if self.padded else "ragged"]
        if self.samples:
            words.append(f"num_samples={self.samples}")
        return ", ".join(words)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments that both wrappers take."""
        return {
            "input_mode": self.mode,
            "generate": self.generate,
            "pad_output": self.padded,
            "num_samples": self.samples,
            "inplace": False,
        }


CASES = [
    Case(mode, generate, padded, samples)
    for mode in MODES
    for generate in (True, False)
    for padded in (False, True)
    for samples in ((None, 2) if generate else (None,))
]


# Running both


def make_input(case: Case, tokenizer: Any) -> TensorDict:
    """The prompts, or complete texts to score."""
    part = "prompt" if case.generate else "full"
    answers = [None] * len(QUESTIONS) if case.generate else ANSWERS
    rows: list[dict[str, Any]]
    if case.mode == "history":
        chats = [
            [{"role": "user", "content": question}]
            + ([] if answer is None else [{"role": "assistant", "content": answer}])
            for question, answer in zip(QUESTIONS, answers, strict=True)
        ]
        histories = History.from_chats(chats)
        rows = [{"history": ChatHistory(**{part: chat}, batch_size=())} for chat in histories]
    elif case.mode == "text":
        rows = [{"text": Text(**{part: question}, batch_size=())} for question in QUESTIONS]
    else:
        ids = [torch.tensor(row) for row in tokenizer(list(QUESTIONS))["input_ids"]]
        rows = [{"tokens": Tokens(**{part: row}, batch_size=())} for row in ids]
    return lazy_stack([TensorDict(row, batch_size=()) for row in rows])


def row_options(tokenizer: Any) -> list[dict[str, Any]]:
    """What makes the rows end where they should, and one of them say a word."""
    (word,) = tokenizer(LED_TO)["input_ids"]
    options: list[dict[str, Any]] = [
        {} if end is None else {"min_new_tokens": end - 1, "logit_bias": {EOS: 100.0}}
        for end in ENDS
    ]
    options[LED]["logit_bias"][word] = 50.0
    return options


class RowOptions(LogitsProcessor):
    """The same options for Hugging Face's ``generate``."""

    def __init__(self, options: Sequence[dict[str, Any]]) -> None:
        self.options = options
        self.start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = input_ids.shape[1] if self.start is None else self.start
        done, repeats = input_ids.shape[1] - self.start, len(scores) // len(self.options)
        for index, row in enumerate(scores):
            options = self.options[index // repeats]
            for token, bias in options.get("logit_bias", {}).items():
                row[token] += bias
            if done < options.get("min_new_tokens", 0):
                row[EOS] = -torch.inf
        return scores


def run_theirs(case: Case, model: Any, tokenizer: Any) -> Any:
    kwargs: dict[str, Any] = {}
    if case.generate:  # of several samples, each is the likeliest one too
        greedy = {"do_sample": True, "top_k": 1} if case.samples else {"do_sample": False}
        kwargs["generate_kwargs"] = {"max_new_tokens": MOST, **greedy}
    wrapper = TransformersWrapper(
        model,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template if case.mode == "history" else None,
        **kwargs,
        **case.kwargs,
    )
    if case.generate:
        processor = RowOptions(row_options(tokenizer))
        wrapper.generate_kwargs["logits_processor"] = LogitsProcessorList([processor])
    with set_list_to_stack(True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrapper(make_input(case, tokenizer))


def run_ours(case: Case, service: AsyncSGLang, tokenizer: Any) -> Any:
    td = make_input(case, tokenizer)
    kwargs: dict[str, Any] = {}
    if case.generate:
        kwargs["generate_kwargs"] = {"max_new_tokens": MOST, "temperature": 0.0}
        for row, options in zip(td.unbind(0), row_options(tokenizer), strict=True):
            own = {name: NonTensorData(value) for name, value in options.items()}
            row.set("sampling", TensorDict(own))
    return SGLangWrapper(service, tokenizer=tokenizer, **kwargs, **case.kwargs)(td)


# Chat templates

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TemplateCase:
    """A tokenizer, and what both wrappers are told about its template.

    Attributes:
        title: what the page says of it.
        template: the tokenizer's own; None: the tiny model's, which has ``{% generation %}``.
        name: the tokenizer's ``name_or_path``.
        told: the argument that both wrappers get, if any.
    """

    title: str
    template: str | None = None
    name: str = "a-model"
    told: str | None = None


TEMPLATE_CASES = (
    TemplateCase("the tokenizer's, with ``{% generation %}``"),
    TemplateCase("the tokenizer's, without", PLAIN_TEMPLATE),
    TemplateCase("the tokenizer's, of a model with ``qwen`` in its name", name="a-qwen-model"),
    TemplateCase(
        "``chat_template_name='qwen'`` on both sides",
        PLAIN_TEMPLATE,
        told="chat_template_name",
    ),
    TemplateCase(
        "``chat_template=`` with ``{% generation %}`` on both sides",
        PLAIN_TEMPLATE,
        "a-qwen-model",
        "chat_template",
    ),
)


def template_results(
    service: AsyncSGLang, model: Any, tokenizer: Any
) -> list[tuple[TemplateCase, bool, bool]]:
    """Each case, whether the rendered texts are the same, and whether the assistant masks are."""
    results = []
    for case in TEMPLATE_CASES:
        own = copy.deepcopy(tokenizer)
        own.name_or_path, own.chat_template = case.name, case.template or tokenizer.chat_template
        scoring = Case("history", generate=False, padded=False)
        kwargs: dict[str, Any] = {"tokenizer": own, **scoring.kwargs}
        told = {"chat_template_name": "qwen", "chat_template": tokenizer.chat_template}
        if case.told is not None:
            kwargs[case.told] = told[case.told]
        with set_list_to_stack(True), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = TransformersWrapper(model, **kwargs)(make_input(scoring, own))
            ours = SGLangWrapper(service, **kwargs)(make_input(scoring, own))
        both = list(zip(rows_of(theirs), rows_of(ours), strict=True))
        results.append(
            (
                case,
                all(a["text"].full == b["text"].full for a, b in both),
                all(marked(a) == marked(b) for a, b in both),
            )
        )
    return results


def marked(row: Any) -> list[int]:
    """The tokens that the assistant mask marks."""
    ids: list[int] = row["tokens"].full[row["masks"].all_assistant_mask.bool()].tolist()
    return ids


# What a field holds


@dataclass(frozen=True)
class Sizes:
    """Lengths of the rows, without padding."""

    prompts: list[int]
    responses: list[int]
    has_response: bool

    @classmethod
    def of(cls, ours: Sequence[Any], generate: bool) -> Sizes:
        attended = [int(row["masks"].all_attention_mask.sum()) for row in ours]
        if not generate:
            return cls(attended, [0] * len(ours), False)
        sampled = [int(row["masks"].all_assistant_mask.sum()) for row in ours]
        prompts = [a - s for a, s in zip(attended, sampled, strict=True)]
        return cls(prompts, sampled, True)

    def of_part(self, part: str) -> tuple[str, list[int], list[int]]:
        """Symbol of a part, and lengths of what it has of prompt and response."""
        none = [0] * len(self.prompts)
        if not self.has_response:
            return "T", self.prompts, none
        if part == "prompt":
            return "P", self.prompts, none
        if part == "response":
            return "R", none, self.responses
        return "P + R", self.prompts, self.responses


def value_of(row: Any, key: str, part: str) -> Any:
    holder = row.get(key, None)
    value = None if holder is None else getattr(holder, part, None)
    return getattr(value, "data", value) if type(value).__name__ == "MetaData" else value


def describe(values: Sequence[Any], part: str, sizes: Sizes) -> str:
    """Type, shape and padding of a field, the same for all rows; empty where it is not there."""
    if all(value is None for value in values):
        return ""
    if all(isinstance(value, History) for value in values):
        return f"``History`` {_all_of(list(value.batch_size) for value in values)}"
    if all(isinstance(value, torch.Tensor) for value in values):
        dtype = _all_of(str(value.dtype).removeprefix("torch.") for value in values)
        return f"``{dtype}`` {_shape(values, part, sizes)}"
    if part == "padded":
        return f"``{_all_of(values)}``"
    return f"``{_all_of(type(value).__name__ for value in values)}``"


def _all_of(values: Iterable[Any]) -> str:
    """What is the same for all rows, or the different ones."""
    return " or ".join(dict.fromkeys(map(str, values)))


def _shape(values: Sequence[torch.Tensor], part: str, sizes: Sizes) -> str:
    symbol, before, after = sizes.of_part(part)
    lengths = [len(value) for value in values]
    if lengths == [a + b for a, b in zip(before, after, strict=True)]:
        return f"[{symbol}]"
    if set(lengths) != {max(before) + max(after)}:
        return f"{lengths}"
    fills = []
    left = [value[: max(before) - size] for value, size in zip(values, before, strict=True)]
    right = [value[max(before) + size :] for value, size in zip(values, after, strict=True)]
    for side, pads in (("left", left), ("right", right)):
        found = torch.cat(list(pads))
        if len(found):
            fills.append(f"{side} with {_fill(found)}")
    return f"[{symbol}], padded " + " and ".join(fills)


def _fill(pads: torch.Tensor) -> str:
    if pads.dtype.is_floating_point and pads.isnan().all():
        return "NaN"
    if pads.dtype.is_floating_point and (pads == 0).all():
        return "0"
    if pads.dtype == torch.bool:
        return "False" if not pads.any() else "True"
    if (pads == PAD).all():
        return "pads"
    return "other values"


# Comparing


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A field of both wrappers' outputs, row by row."""

    case: Case
    key: str
    part: str
    theirs: list[Any]
    ours: list[Any]
    sizes: Sizes
    rows: list[Any] = field(repr=False)  # our outputs, for what a note says of other fields

    @property
    def name(self) -> str:
        return f"{self.key}.{self.part}"

    @property
    def described(self) -> tuple[str, str]:
        return (
            describe(self.theirs, self.part, self.sizes),
            describe(self.ours, self.part, self.sizes),
        )

    @property
    def same(self) -> bool:
        theirs, ours = self.described
        return theirs == ours and self.same_values

    @property
    def same_values(self) -> bool:
        return all(
            self.equal(theirs, ours, index)
            for index, (theirs, ours) in enumerate(zip(self.theirs, self.ours, strict=True))
        )

    def equal(self, theirs: Any, ours: Any, index: int) -> bool:
        """Whether both have the same value in a row."""
        if isinstance(ours, History):
            return contents(theirs) == contents(ours)
        if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            return bool(theirs == ours)
        if theirs.shape != ours.shape:
            return False
        if not ours.dtype.is_floating_point:
            return torch.equal(theirs, ours)
        if self.case.generate:
            return self.agree(theirs, ours, index)
        return torch.allclose(theirs.float(), ours, atol=TOLERANCE, rtol=0, equal_nan=True)

    def agree(self, theirs: torch.Tensor, ours: torch.Tensor, index: int, start: int = 0) -> bool:
        """Whether log-probs of a response are the same, those aside that contain a bias."""
        place = index // (self.case.samples or 1)
        end = start if place == LED else (ENDS[place] or MOST + 1) - 1
        return torch.allclose(theirs[start:end], ours[start:end], atol=TOLERANCE, rtol=0)


def contents(history: History) -> list[tuple[str, str, bool]]:
    turns = history.tolist(tolist_first=True)
    return [(turn["role"], turn["content"], turn["is_complete"]) for turn in turns]


def pairs(case: Case, theirs: Any, ours: Any) -> Iterable[Pair]:
    """Every field that at least one of both has."""
    if theirs.batch_size != ours.batch_size:
        raise AssertionError(f"{case}: batch sizes {theirs.batch_size} and {ours.batch_size}")
    his, mine = rows_of(theirs), rows_of(ours)
    sizes = Sizes.of(mine, case.generate)
    for key, parts in FIELDS.items():
        for part in parts:
            pair = Pair(
                case=case,
                key=key,
                part=part,
                theirs=[value_of(row, key, part) for row in his],
                ours=[value_of(row, key, part) for row in mine],
                sizes=sizes,
                rows=mine,
            )
            if any(pair.described):
                yield pair


def rows_of(td: Any) -> list[Any]:
    return list((td.reshape(-1) if td.ndim > 1 else td).unbind(0))


# Explaining


@dataclass(frozen=True)
class Note:
    """Why a field differs.

    Attributes:
        label: the footnote's name.
        text: what the page says.
        applies: the fields that it is about.
        holds: whether what it says is true of a field's values.
    """

    label: str
    text: str
    applies: Callable[[Pair], bool]
    holds: Callable[[Pair], bool]


def only_ours(pair: Pair) -> bool:
    theirs, ours = pair.described
    return not theirs and bool(ours)


def first_is_zero(pair: Pair) -> bool:
    """Their first log-prob is 0, ours is the token's; all others are the same."""
    for index, (theirs, ours) in enumerate(zip(pair.theirs, pair.ours, strict=True)):
        length = pair.sizes.responses[index]
        if theirs[0] != 0 or not pair.agree(theirs, ours, index, start=1):
            return False
        padding = slice(length, None)
        if theirs.shape != ours.shape or ours[padding].any() or not (theirs[padding] < 0).all():
            return False
    return all(row[0] < -0.01 for row in pair.ours[:1])


def scores_agree(pair: Pair) -> bool:
    """bf16 with 0 for the first token against float32 with NaN; else the same."""
    for theirs, ours, length in zip(pair.theirs, pair.ours, pair.sizes.prompts, strict=True):
        first = len(ours) - length
        if (theirs.dtype, ours.dtype) != (torch.bfloat16, torch.float32):
            return False
        if theirs[first] != 0 or not ours[first].isnan():
            return False
        if not torch.allclose(theirs.float(), ours.nan_to_num(0.0), atol=TOLERANCE, rtol=0):
            return False
    return True


def stripped(pair: Pair) -> bool:
    """Their answers are ours without white space at the ends; nothing else differs."""
    for theirs, ours in zip(pair.theirs, pair.ours, strict=True):
        expected = [(r, c.strip() if r == "assistant" else c, d) for r, c, d in contents(ours)]
        if contents(theirs) != expected:
            return False
    return True


def pads_kept(pair: Pair) -> bool:
    """Their full text is ours between pads, and their response is cut off at a wrong place."""
    cut = False
    for index, (theirs, ours) in enumerate(zip(pair.theirs, pair.ours, strict=True)):
        sizes = pair.sizes
        before = max(sizes.prompts) - sizes.prompts[index]
        after = max(sizes.responses) - sizes.responses[index]
        text = pair.rows[index]["text"]
        whole = "<|endoftext|>" * before + text.full + "<|endoftext|>" * after
        if pair.part == "response":
            whole = whole[len(text.prompt) :]
        if theirs != whole or text.full != text.prompt + text.response:
            return False
        cut = cut or theirs != ours
    return cut


def sampled_marked(pair: Pair) -> bool:
    """Exactly the sampled tokens are marked."""
    return all(
        row["tokens"].full[mask].tolist() == row["tokens"].response[:length].tolist()
        for row, mask, length in zip(pair.rows, pair.ours, pair.sizes.responses, strict=True)
    )


def whole_log_probs(pair: Pair) -> bool:
    """NaN for the prompt, and what ``response`` has after it."""
    for row in pair.rows:
        full, mask = row["log_probs"].full, row["masks"].all_assistant_mask
        response = row["log_probs"].response[: int(mask.sum())]
        padding = ~row["masks"].all_attention_mask
        if not full[~mask & ~padding].isnan().all() or not torch.equal(full[mask], response):
            return False
        if not row["log_probs"].prompt.isnan().all():
            return False
    return True


def texts_of_tokens(pair: Pair) -> bool:
    """What the tokens say: prompt and response follow each other in the full text."""
    return all(row["text"].full == row["text"].prompt + row["text"].response for row in pair.rows)


NOTES = [
    Note(
        "first",
        "``TransformersWrapper`` sets the log-prob of the first sampled token to 0, which is "
        "log 1. Ours is the token's log-prob. The other tokens agree. In padding theirs has the "
        "log-prob of the pad token, ours 0.",
        lambda p: p.case.generate and p.name == "log_probs.response",
        first_is_zero,
    ),
    Note(
        "prompt",
        "``TransformersWrapper`` has log-probs of the response alone when it generates. Ours are "
        "as long as the tokens, with NaN for the prompt, so that they line up with the masks; "
        "``extras=['input_log_probs']`` fills the prompt.",
        lambda p: p.case.generate and p.name in ("log_probs.prompt", "log_probs.full"),
        lambda p: only_ours(p) and whole_log_probs(p),
    ),
    Note(
        "assistant",
        "``TransformersWrapper`` leaves the assistant mask out when it generates. Ours marks "
        "exactly the sampled tokens.",
        lambda p: p.case.generate and p.name == "masks.all_assistant_mask",
        lambda p: only_ours(p) and sampled_marked(p),
    ),
    Note(
        "score",
        "``TransformersWrapper`` scores in the model's dtype and has 0 for the first token, which "
        "nothing precedes. Ours are float32, with NaN there, so that a loss leaves it out. The "
        "other tokens agree.",
        lambda p: not p.case.generate and p.name == "log_probs.full",
        scores_agree,
    ),
    Note(
        "pads",
        "``TransformersWrapper`` decodes the padded row: its full text has pad tokens in it, and "
        "its response is cut off that text where the prompt would end without them. Ours is what "
        "was said.",
        lambda p: (
            p.case.mode == "history"
            and p.case.padded
            and p.case.generate
            and p.name in ("text.response", "text.full")
        ),
        pads_kept,
    ),
    Note(
        "strip",
        "``TransformersWrapper`` parses the answer out of the full text and strips white space "
        "from its ends. Ours is what was sampled, without the EOS or stop that ended it.",
        lambda p: (
            p.case.mode == "history"
            and p.case.generate
            and p.name in ("history.response", "history.full")
        ),
        stripped,
    ),
    Note(
        "text",
        "Text in tokens mode is ours alone where there is a tokenizer; ``text_key=None`` leaves "
        "it out.",
        lambda p: p.case.mode == "tokens" and p.case.generate and p.key == "text",
        lambda p: only_ours(p) and texts_of_tokens(p),
    ),
]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: the field.
        theirs, ours: what it holds.
        result: "same", "differs", or "only ours".
        note: label of what explains a difference; None for none.
    """

    name: str
    theirs: str
    ours: str
    result: str
    note: str | None


def row_of(pair: Pair) -> Row:
    theirs, ours = pair.described
    if pair.same:
        return Row(pair.name, theirs, ours, "same", None)
    result = "differs" if theirs and ours else "only ours" if ours else "only theirs"
    notes = [note.label for note in NOTES if note.applies(pair) and note.holds(pair)]
    return Row(pair.name, theirs, ours, result, notes[0] if notes else None)


def compare(service: AsyncSGLang, model: Any, tokenizer: Any) -> dict[Case, list[Row]]:
    """The whole table."""
    return {
        case: [
            row_of(pair)
            for pair in pairs(
                case, run_theirs(case, model, tokenizer), run_ours(case, service, tokenizer)
            )
        ]
        for case in CASES
    }


def unexplained(table: dict[Case, list[Row]]) -> list[str]:
    """Differences that no note explains."""
    return [
        f"{case.mode}, generate={case.generate}, {case.title}: {row.name} {row.result}: "
        f"{row.theirs or 'nothing'} against {row.ours or 'nothing'}"
        for case, rows in table.items()
        for row in rows
        if row.result != "same" and row.note is None
    ]


# Writing

INTRO = """\
..
   Made by tools/parity_table.py: do not edit.

Compared with TransformersWrapper
=================================

What ``SGLangWrapper`` returns has the structure of what TorchRL's ``TransformersWrapper`` returns
for the same model and the same prompts. This page compares them field by field: type, dtype, shape,
padding and values. A script runs both on a tiny model and writes the page, and a test runs it again
and fails where the page is no longer true, or where a difference is not explained below.

Four rows of different lengths go in. Both sample greedily. Biases on the logits make three rows end
with EOS after a few tokens, and one of them say a word; log-probs that contain these biases are not
compared. Where there are two samples, both are the likeliest. Log-probs are called the same within
{tolerance}: the head of ``TransformersWrapper``'s model computes in bfloat16, the server's in
float32.

``[P]`` is the length of a row's prompt, ``[R]`` of its response and ``[T]`` of a text that is
scored; in padded rows, that of the longest. A dash means that the field is not there. What
``SGLangWrapper`` returns under ``rollout`` has no counterpart and is left out here.
"""


TEMPLATES = """\
``SGLangWrapper`` renders a chat with the tokenizer's own template, the one that the model was
trained with, and finds what the assistant wrote in any template. ``TransformersWrapper`` looks at
the model's name first: with ``qwen``, ``llama``, ``deepseek``, ``falcon`` or ``dialogpt`` in it, a
template of TorchRL's is used, whatever the tokenizer has; else the tokenizer's own, if it has
``generation`` tags; else TorchRL's ``chatml_format``. TorchRL's templates mark an answer without
the token that ends it. So prompt and assistant mask differ unless both are told the same template.
Everything else on this page was compared with the tokenizer's own on both sides, as
``TransformersWrapper(chat_template=tokenizer.chat_template)``.
"""

TESTS = """\
``tools/torchrl_tests.py`` runs TorchRL's published tests with its classes swapped for ours, on a
real server and a tiny model. Of ``test/llm/test_wrapper.py`` as published with 0.14.1, 155 items
reach the swapped class. With ``--no-rollout`` (``rollout_key=None``, since TorchRL's wrappers have
no such output) and ``--any-message`` (an expected error is one by its type), {passed} pass,
{skipped} skip themselves, one is expected to fail and does, and {failed} fail:

"""
# Counted with torchrl 0.14.1, and why each that fails does.
COUNTED = {"passed": 138, "skipped": 10}
FAILING = {
    "test_parameter_conflict_resolution[vllm_sync], [vllm_async]": (
        "``max_tokens`` and ``max_new_tokens`` are given with different values. TorchRL takes the "
        "older name's; here an option is honoured or refused, and of these two one can't be."
    ),
    "test_log_probs_consistency[padded-history], [unpadded-history]": (
        "The model is called Qwen and no template is given: see above. The test takes the "
        "assistant mask for one without the token that ends the answer, which ours marks, since "
        "it is sampled and trained on. With the same template on both sides the masks agree."
    ),
    "test_log_probs_consistency[padded-text], [unpadded-text]": (
        "The sampled text is tokenised again, and the test expects the sampled ids. The random "
        "tiny model's text does not give them back; the ids that both wrappers score are the same."
    ),
}


def render(table: dict[Case, list[Row]], templates: list[tuple[TemplateCase, bool, bool]]) -> str:
    """The page."""
    parts = [INTRO.format(tolerance=TOLERANCE), _heading("In short", "-"), _summary(table)]
    parts += [_heading("Differences", "-"), _notes()]
    parts += [_heading("Chat templates", "-"), TEMPLATES, _templates(templates)]
    parts += [_heading("TorchRL's own tests", "-"), _tests()]
    titles = {"history": "History", "text": "Text", "tokens": "Tokens"}
    for mode in MODES:
        for generate in (True, False):
            verb = "generating" if generate else "scoring"
            parts.append(_heading(f"{titles[mode]}, {verb}", "-"))
            for case in CASES:
                if (case.mode, case.generate) == (mode, generate):
                    parts += [f"{case.title.capitalize()}:\n", _table(table[case])]
    return "\n".join(parts).rstrip("\n") + "\n"


def _templates(results: list[tuple[TemplateCase, bool, bool]]) -> str:
    words = {True: "same", False: "differs"}
    cells = [(case.title, words[text], words[mask]) for case, text, mask in results]
    return _rst_table(("Template", "Prompt", "Assistant mask"), cells, "60 20 20")


def _tests() -> str:
    failed = sum(names.count("[") for names in FAILING)
    lines = TESTS.format(failed=failed, **COUNTED)
    for names, why in FAILING.items():
        item = f"- ``{names.replace(', ', '``, ``')}``: {why}"
        lines += textwrap.fill(item, 100, subsequent_indent="  ") + "\n"
    return lines


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def _result(row: Row) -> str:
    return row.result if row.note is None else f"{row.result} [{row.note}]_"


def _rst_table(header: Sequence[str], rows: Iterable[Sequence[str]], widths: str) -> str:
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for cells in (header, *rows):
        for number, cell in enumerate(cells):
            lines.append(f"   {'* -' if number == 0 else '  -'} {cell or '–'}")  # noqa: RUF001
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    cells = [(f"``{row.name}``", row.theirs, row.ours, _result(row)) for row in rows]
    return _rst_table(
        ("Field", "``TransformersWrapper``", "``SGLangWrapper``", "Result"), cells, "22 30 30 18"
    )


def _summary(table: dict[Case, list[Row]]) -> str:
    """Each field in each mode, all layouts together."""
    columns = [(mode, generate) for mode in MODES for generate in (True, False)]
    header = ["Field"] + [f"{m}, {'generating' if g else 'scoring'}" for m, g in columns]
    lines = []
    for key, parts in FIELDS.items():
        for part in parts:
            cells = [f"``{key}.{part}``"]
            for mode, generate in columns:
                found = [
                    (case.padded, _result(row))
                    for case, rows in table.items()
                    for row in rows
                    if (case.mode, case.generate, row.name) == (mode, generate, f"{key}.{part}")
                ]
                cells.append(_in_short(found))
            lines.append(cells)
    return _rst_table(header, lines, "22 13 13 13 13 13 13")


def _in_short(results: Sequence[tuple[bool, str]]) -> str:
    """One cell for all layouts."""
    ragged, padded = (
        " or ".join(dict.fromkeys(result for is_padded, result in results if is_padded is wanted))
        for wanted in (False, True)
    )
    return ragged if ragged == padded else f"ragged {ragged}, padded {padded}"


def _notes() -> str:
    return "".join(
        textwrap.fill(f".. [{note.label}] {note.text}", 100, subsequent_indent="   ") + "\n"
        for note in NOTES
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "test/llm"), str(ROOT / "examples")]
    from helpers.servers import CPU_SERVER_ARGS, make_peaked_model

    with tempfile.TemporaryDirectory() as folder:
        path = make_peaked_model(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(path)
        with AsyncSGLang.from_pretrained(str(path), device="cpu", **CPU_SERVER_ARGS) as service:
            table = compare(service, model, tokenizer)
            templates = template_results(service, model, tokenizer)
    missing = unexplained(table)
    if missing:
        sys.exit("not explained by any note:\n" + "\n".join(missing))
    args.output.write_text(render(table, templates))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
