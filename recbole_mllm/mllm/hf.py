"""A Hugging Face model as this project uses it: it writes answers, scores Yes against No, and is fine-tuned."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from recbole_mllm.common.prompts import IMAGE, Prompt, Style
from recbole_mllm.common.settings import MLLMSettings
from recbole_mllm.mllm import placement, sharding
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.encoder import IMAGE_BYTES, AnswerTokens, Encoded, Encoder, answer_tokens, image_bytes
from recbole_mllm.mllm.families import architecture_of
from recbole_mllm.mllm.generation import answer
from recbole_mllm.mllm.interface import Work
from recbole_mllm.mllm.loading import Loaded, dtype_of, load
from recbole_mllm.mllm.loss import make_examples
from recbole_mllm.mllm.scoring import scoring_mode, yes_logits

_META = torch.device("meta")


class HFModel:
    """A causal (multimodal) language model with its encoder; `identity` names the weights and their precision."""

    def __init__(
        self,
        name: str,
        settings: MLLMSettings,
        device: torch.device,
        slots: int = 64,
        *,
        four_bit: bool = False,
        to_split: bool = False,
        loaded: Loaded | None = None,
    ) -> None:
        """Load `name`, unless it is there already as `loaded` (a benchmark's random weights, which have no files).

        What is `to_split` may be too large for `device`, and waits in the machine's own memory for `split`.
        """
        dtype = dtype_of(settings.dtype, device)
        if loaded is None:
            gc.collect()  # a model is a web of references in circles: the one before would stay beside this one
            at = torch.device("cpu") if to_split else device
            placed = placement.placement(settings, device)
            trusted = settings.trust_remote_code
            loaded = load(name, dtype, at, trust_remote_code=trusted, four_bit=four_bit, placed=placed)
        self.identity = f"{loaded.identity}:{str(dtype).removeprefix('torch.')}{':nf4' if four_bit else ''}"
        self.model: Any = loaded.model
        self.device = device
        self.backbone = Backbone(loaded.model)
        self.slots = slots
        parts = loaded.tokenizer, loaded.processor, settings.max_text_tokens
        self.encoder = Encoder(*parts, self.backbone.architecture, positions_of(loaded.model.config))
        self.tokens_read = 0

    def replace_model(self, model: Any) -> None:
        """Continue with `model`, the same one with an adapter around it."""
        self.model = model
        self.backbone = Backbone(model)

    def split(self) -> None:
        """Split the model's layers among the processes that share its work; all of them must do so."""
        sharding.split(self.model, self.device)
        self.backbone = Backbone(self.model, split=True)
        self.try_out()  # here, as later one process would score while another one learns

    def try_out(self) -> None:
        """Find out how a family without a row of its own is scored, with an image if it reads any."""
        if self.backbone.architecture.known:
            return
        scoring_mode(self.backbone, [self.encoder(Prompt("A question? Answer Yes or No."))], ())
        if self.encoder.processor is not None and not self.backbone.architecture.attends_across:
            with TemporaryDirectory() as folder:
                Image.new("RGB", (64, 64), "grey").save(path := Path(folder) / "grey.png")
                scoring_mode(self.backbone, [self.encoder(Prompt(f"{IMAGE} Answer Yes or No.", (path,)))], ())

    def checkpoint_gradients(self) -> None:
        """Compute layers again on the way back rather than keep their activations; the gradients are the same.

        The non-reentrant kind needs no input that requires gradients, so frozen embeddings do not cut it off.
        """
        self.backbone.head_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def answers(self, style: Style) -> AnswerTokens:
        """Return the tokens of the style's Yes and No as they follow a prompt."""
        return answer_tokens(self.encoder, style.answer_yes, style.answer_no)

    def write(self, work: Work) -> None:
        """Answer what `work` holds, up to `slots` prompts at a time."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        stop = {self.encoder.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        answer(self.backbone, self.encoder, frozenset(stop - {None}), self.slots, work)

    def yes_scores(self, prompts: Sequence[Prompt], answers: AnswerTokens, *, share_prefix: bool = True) -> Tensor:
        """Return ``[B]`` float32 log-odds of Yes against No for each prompt; its sigmoid is P(Yes) (paper, eq. 1)."""
        out, words = torch.empty(len(prompts)), (answers.yes[0], answers.no[0])
        with self.backbone.without_gradients():
            for places, encoded in self._parts(prompts):
                self.tokens_read += sum(len(e.ids) for e in encoded)
                names = [repr(prompts[place].text[:200]) for place in places]
                logits = yes_logits(self.backbone, encoded, words, share_prefix=share_prefix, name=names.__getitem__)
                out[places] = logits[:, 0] - logits[:, 1]
        return out

    def _parts(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Yield the places of prompts and these encoded, all at once unless their images would fill the memory."""
        places, encoded, held = list[int](), list[Encoded](), dict[str, int]()
        for place in sorted(range(len(prompts)), key=lambda i: prompts[i].images):
            one = self.encoder(prompts[place])
            shown = {image.key: image_bytes(image) for image in one.images}
            if places and sum((held | shown).values()) > max(IMAGE_BYTES, sum(held.values())):
                yield places, encoded
                places, encoded, held = [], [], {}
            held |= shown
            places.append(place)
            encoded.append(one)
        if places:
            yield places, encoded

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Return the token ids and images of each prompt."""
        return [self.encoder(prompt) for prompt in prompts]

    def examples(self, prompts: Sequence[Prompt], labels: Tensor, answers: AnswerTokens) -> list[Encoded]:
        """Return each prompt with its right answer, encoded: Yes where the label is 1, else No."""
        return make_examples(self.encode(prompts), [answers.yes if y else answers.no for y in labels.tolist()])


def encoder_of(name: str, settings: MLLMSettings) -> Encoder:
    """Return the encoder of the model `name`, of which no weights are read.

    Raises:
        UserError: Its config, tokenizer or processor is neither on this disk nor to be had.
    """
    loaded = load(name, torch.float32, _META, trust_remote_code=settings.trust_remote_code, weights=False)
    parts = loaded.tokenizer, loaded.processor, settings.max_text_tokens
    return Encoder(*parts, architecture_of(loaded.model), positions_of(loaded.model.config))


def positions_of(config: Any) -> int:
    """Return how many positions the language model has; without a limit, more than any prompt takes."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 10**9)
