"""A Hugging Face model as this project uses it: it writes answers, scores Yes against No, and is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_mllm.mllm.base import Work
from recbole_mllm.mllm.encode import AnswerTokens, Encoded, Encoder, answer_tokens
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.generation import Generation
from recbole_mllm.mllm.loading import dtype_of, load
from recbole_mllm.mllm.scoring import yes_logits
from recbole_mllm.mllm.sft import example_loss, make_examples
from recbole_mllm.prompts import Prompt, Style
from recbole_mllm.settings import MLLMSettings


class HFModel:
    """A causal (multimodal) language model with its encoder; `identity` names the weights and their precision."""

    def __init__(
        self, name: str, settings: MLLMSettings, device: torch.device, slots: int = 64, *, four_bit: bool = False
    ) -> None:
        dtype = dtype_of(settings.dtype, device)
        loaded = load(name, dtype, device, trust_remote_code=settings.trust_remote_code, four_bit=four_bit)
        self.identity = f"{loaded.identity}:{str(dtype).removeprefix('torch.')}{':nf4' if four_bit else ''}"
        self.model: Any = loaded.model
        self.device = device
        limit = context_of(loaded.model.config)
        self.body = Body(loaded.model)
        self.slots = slots
        longest = min(settings.max_text_tokens, limit)
        self.encoder = Encoder(loaded.tokenizer, loaded.processor, longest, self.body.architecture)
        self.tokens_read = 0

    def replace_model(self, model: Any) -> None:
        """Go on with `model`, the same one with an adapter around it."""
        self.model = model
        self.body = Body(model)

    def checkpoint_gradients(self) -> None:
        """Compute layers again on the way back rather than keep what they computed; the gradients are the same.

        The non-reentrant kind needs no input that requires gradients, so frozen embeddings do not cut it off.
        """
        self.body.head_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def answers(self, style: Style) -> AnswerTokens:
        """Return the tokens of the style's Yes and No as they follow a prompt."""
        return answer_tokens(self.encoder, style.answer_yes, style.answer_no)

    def write(self, work: Work) -> None:
        """Answer what `work` holds, up to `slots` prompts at a time."""
        stop = {self.encoder.tokenizer.eos_token_id}
        said = getattr(self.model.generation_config, "eos_token_id", None)
        stop |= set(said if isinstance(said, list) else [said])
        Generation(self.body, self.encoder, frozenset(stop - {None}), self.slots).run(work)

    @torch.inference_mode()
    def yes_scores(self, prompts: Sequence[Prompt], answers: AnswerTokens, *, share_prefix: bool = True) -> Tensor:
        """Return ``[B]`` float32 log-odds of Yes against No for each prompt; its sigmoid is P(Yes) (paper, eq. 1)."""
        encoded = self.encode(prompts)
        self.tokens_read += sum(len(e.ids) for e in encoded)
        asked = (answers.yes[0], answers.no[0])
        logits = yes_logits(
            self.body, encoded, asked, share_prefix=share_prefix, name=lambda i: repr(prompts[i].text[:200])
        )
        return logits[:, 0] - logits[:, 1]

    def examples(self, prompts: Sequence[Prompt], labels: Tensor, answers: AnswerTokens) -> list[Encoded]:
        """Return each prompt with its right answer, encoded: Yes where the label is 1, else No."""
        return make_examples(self.encode(prompts), [answers.yes if y else answers.no for y in labels.tolist()])

    def loss(
        self,
        prompts: Sequence[Prompt],
        labels: Tensor,
        answers: AnswerTokens,
        *,
        whole: bool = False,
        share_prefix: bool = False,
    ) -> Tensor:
        """Return the mean next-token loss of the right answers, over the answer or over the `whole` sequence."""
        return example_loss(self.body, self.examples(prompts, labels, answers), whole=whole, share=share_prefix)

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Return the token ids and images of each prompt."""
        return [self.encoder(prompt) for prompt in prompts]


def context_of(config: Any) -> int:
    """Return how many positions the language model has, less a little room for an answer."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 10**9
    image = getattr(config, "image_seq_length", 0) or 0
    return max(64, positions - image - 48)
