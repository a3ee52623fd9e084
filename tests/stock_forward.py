"""What transformers itself makes of a prompt: its processor's ids and its own forward pass, with nothing of ours."""

from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from recbole_mllm.common.prompts import IMAGE, Prompt, read_style
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import Settings
from recbole_mllm.mllm.loss import example_loss

KEYS = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()) | {"mllm": "tiny"}
SETTINGS = Settings.from_config(KEYS)
STYLE = read_style("demo")
CPU = torch.device("cpu")


def own_inputs(tokenizer: Any, processor: Any, prompt: Prompt, answer: str = "") -> dict[str, Tensor]:
    """Return the model's inputs as its processor makes them, with `answer` in the assistant's turn if given."""
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": not answer, "return_tensors": "pt"}
    pictures = [Image.open(path) for path in prompt.images]
    if processor is None:
        reply = [{"role": "assistant", "content": answer}] if answer else []
        return dict(tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}, *reply], **options))
    if not processor.chat_template:
        return _paligemma(tokenizer, processor, prompt, pictures, answer)
    left = iter(pictures)
    head, *tails = prompt.text.split(IMAGE)
    content: list[dict[str, Any]] = [{"type": "text", "text": head}] if head else []
    for tail in tails:
        content += [{"type": "image", "image": next(left)}, *([{"type": "text", "text": tail}] if tail else [])]
    reply = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else []
    return dict(processor.apply_chat_template([{"role": "user", "content": content}, *reply], **options))


def _paligemma(tokenizer: Any, processor: Any, prompt: Prompt, pictures: list[Any], answer: str) -> dict[str, Tensor]:
    if pictures:
        suffix = {"suffix": answer} if answer else {}
        made = dict(processor(text=prompt.text, images=pictures, return_tensors="pt", **suffix))
        del made["labels"]
        return made
    # its processor knows no prompt without an image: the same layout without one
    texts = f"<bos>{prompt.text}\n", *([f"{answer}<eos>"] if answer else [])
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    kinds = [[n] * len(part) for n, part in enumerate(parts)]
    ids = torch.tensor([sum(parts, [])])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.tensor([sum(kinds, [])])}


def own_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the stock forward pass's ``[T, V]`` float32 logits of one prompt."""
    with torch.no_grad():
        return model(**inputs).logits[0].float()


def loss_of(mllm: Any, prompts: list[Prompt], labels: Tensor, **how: bool) -> Tensor:
    """Return our loss of the prompts' right answers."""
    return example_loss(mllm.backbone, mllm.examples(prompts, labels, mllm.answers(STYLE)), **how)
