"""Images through the wrapper into a small random vision-language model, against Hugging Face.

    python benchmarks/check_vision.py --out benchmarks/results/vision_h200.json

SGLang's CPU engine loads no vision model, so this needs a GPU.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensordict import NonTensorStack, TensorDict, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny_model import make_tokenizer

from torchrl_sglang import AsyncSGLang, SGLangWrapper

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
NUM_TOKENS = 24


def make_processor() -> Qwen2VLProcessor:
    small = make_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small.backend_tokenizer,
        pad_token=small.pad_token,
        eos_token=small.eos_token,
        extra_special_tokens=["<|im_start|>", *SPECIAL],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    limits = {"min_pixels": 56 * 56, "max_pixels": 256 * 256}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        video_processor=Qwen2VLVideoProcessor(**limits),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def make_model(folder: str, processor: Qwen2VLProcessor, device: str) -> Any:
    tokenizer = processor.tokenizer
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 128,
            "num_heads": 4,
            "hidden_size": 256,
            "in_chans": 3,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(4)  # a distribution that is not uniform
        for parameter in model.model.visual.parameters():
            parameter.mul_(3)  # images that matter
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (3, 8, 8), generator=generator).float()
    pixels = torch.nn.functional.interpolate(coarse[None], size=(112, 140))[0]
    return Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())


def as_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@torch.no_grad()
def error(model: Any, processor: Any, prompt: str, images: list[Image.Image], row: Any) -> float:
    """Largest difference of the reported log-probs and Hugging Face's."""
    ids, log_probs = row["tokens"].response.cpu(), row["log_probs"].response.cpu()
    inputs = processor(text=[prompt], images=images, return_tensors="pt").to(model.device)
    number = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None].to(model.device)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(ids))], 1)
    logits = model(**inputs).logits[0, number - 1 : -1].float().log_softmax(-1)
    ours = logits.gather(-1, ids[:, None].to(model.device))[:, 0].cpu()
    return (ours - log_probs).abs().max().item()


def check(service: AsyncSGLang, model: Any, processor: Any) -> dict[str, Any]:
    options = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.0}
    pictures = [picture(0), picture(1), picture(2)]
    result: dict[str, Any] = {}
    # Text: a placeholder in the prompt, the pictures as a sampling key of the row.
    policy = SGLangWrapper(
        service, input_mode="text", inplace=False, pad_output=False, generate_kwargs=options
    )
    prompt = f"{PLACEHOLDER}What is this?"
    per_row = [[pictures[0]], [pictures[1]], [pictures[0]]]
    rows = TensorDict(
        text=Text(prompt=[prompt] * 3, batch_size=3),
        sampling=TensorDict(
            images=NonTensorStack(*[[as_url(p) for p in row] for row in per_row]), batch_size=3
        ),
        batch_size=3,
    )
    out = policy(rows)
    result["text_errors"] = [
        error(model, processor, prompt, images, row)
        for images, row in zip(per_row, out.unbind(0), strict=True)
    ]
    responses = [row["tokens"].response.tolist() for row in out.unbind(0)]
    result["same_image_same_tokens"] = responses[0] == responses[2]
    result["other_image_other_tokens"] = responses[0] != responses[1]
    # History: two pictures in one message.
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": as_url(pictures[1])}},
                {"type": "text", "text": "and "},
                {"type": "image", "image": as_url(pictures[2])},
                {"type": "text", "text": "differ?"},
            ],
        }
    ]
    history = SGLangWrapper(
        service, input_mode="history", inplace=False, pad_output=False, generate_kwargs=options
    )
    chats = ChatHistory(prompt=History.from_chats([chat]), batch_size=1)
    row = history(TensorDict(history=chats, batch_size=1))[0]
    rendered = processor.tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "and "},
                    {"type": "image"},
                    {"type": "text", "text": "differ?"},
                ],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    result["history_error"] = error(model, processor, rendered, pictures[1:], row)
    result["history_other_pictures_error"] = error(model, processor, rendered, pictures[:2], row)
    result["prompt_tokens_here"] = row["tokens"].prompt.shape[-1]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--log-dir", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    set_list_to_stack(True).set()
    with tempfile.TemporaryDirectory() as folder:
        processor = make_processor()
        model = make_model(folder, processor, f"cuda:{args.gpu}")
        with AsyncSGLang.from_pretrained(
            folder,
            device="cuda",
            cuda_devices=[args.gpu],
            log_dir=args.log_dir,
            attention_backend="triton",
            sampling_backend="pytorch",
            mem_fraction_static=0.3,
            disable_cuda_graph=True,
            mm_attention_backend="sdpa",
        ) as service:
            result = {
                "gpu": torch.cuda.get_device_name(args.gpu),
                "sglang": service.sglang_version,
                **check(service, model, processor),
                "command": " ".join(["python", *sys.argv]),
            }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
