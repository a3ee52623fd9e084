"""A plain way to use the tiny MLLM on a demo world: write texts, answer Yes or No, learn with LoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recbole_mllm.common.prompts import Prompt
from tiny_mllm.language import EOS, PAD, one_token, rendered
from tiny_mllm.settings import IMAGE_TOKENS

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True, slots=True)
class Reader:
    """A model, its tokenizer, and the images' pixels ``[3, 64, 64]`` by path."""

    model: Any
    tokenizer: Any
    pixels: dict[Path, Tensor]

    @classmethod
    def load(cls, folder: Path, images: Sequence[Path]) -> Self:
        """Load the model of `folder` in single precision and prepare `images`."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        pixels = {}
        for path in images:
            with Image.open(path) as image:
                pixels[path] = processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        return cls(model, processor.tokenizer, pixels)

    @torch.inference_mode()
    def write(self, prompts: Sequence[Prompt], batch: int = 100) -> list[str]:
        """Answer each prompt with a text, greedily; prompts of like length share a batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].text))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = self._inputs([prompts[i] for i in chosen])
            written = self.model.generate(
                **inputs, max_new_tokens=32, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
            )
            texts = self.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
        return answers

    @torch.inference_mode()
    def yes_scores(self, prompts: Sequence[Prompt], batch: int = 210) -> list[float]:
        """Return logit(Yes) - logit(No) for each prompt; all must have an image, or none."""
        yes, no = one_token(self.tokenizer, " Yes"), one_token(self.tokenizer, " No")
        scores: list[float] = []
        for start in range(0, len(prompts), batch):
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(**self._inputs(prompts[start : start + batch]), logits_to_keep=1).logits[:, -1]
            scores += (logits[:, yes].float() - logits[:, no].float()).tolist()
        return scores

    def finetuned(self, prompts: Sequence[Prompt], answers: Sequence[str], *, lr: float, batch: int = 64) -> Reader:
        """Return a reader whose model has learnt `answers` in one epoch of LoRA; the loss is on the answers alone."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=LORA_TARGETS)
        model = get_peft_model(copy.deepcopy(self.model), config).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
        order = list(range(len(prompts)))
        Random(1).shuffle(order)
        steps = len(order) // batch
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 10) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
            chosen = order[step * batch : (step + 1) * batch]
            inputs = self._inputs([prompts[i] for i in chosen], [answers[i] for i in chosen])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**inputs, logits_to_keep=3).logits[:, :-1]  # an answer is two tokens, word and end
            loss = F.cross_entropy(logits.float().flatten(0, 1), inputs["input_ids"][:, -2:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return replace(self, model=model.eval())

    def _inputs(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> dict[str, Tensor]:
        texts = []
        for prompt, answer in zip(prompts, answers or [""] * len(prompts), strict=True):
            question, reply = rendered(self.tokenizer, prompt, answer)
            texts.append(question.replace("<image>", "<image>" * IMAGE_TOKENS) + (reply if answers else ""))
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        shown = [self.pixels[image] for prompt in prompts for image in prompt.images]
        return inputs | ({"pixel_values": torch.stack(shown)} if shown else {})
