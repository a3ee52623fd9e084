"""Tiny, randomly initialised models of real architectures with real processors, built in a folder at test time."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %} [/INST]{% else %} {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
CORPUS = [
    "The user prefers red colour. Will the user buy it? Answer Yes or No.",
    "Candidate: blue car and red car. Yes No Yes No",
    "Describe the product in the image. Summarize the preference. Update the preference.",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokeniser of a few hundred tokens with a chat template."""
    bare = Tokenizer(models.BPE(unk_token=None))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    bare.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=CHAT,
    )


def _text(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _settle(model: torch.nn.Module) -> None:
    """Scale the weights so that logits depend on the context: at default size an exactness test cannot fail."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)


def llama(folder: Path, seed: int = 0) -> Path:
    """Write a text-only Llama."""
    torch.manual_seed(seed)
    words = tokenizer()
    model = LlamaForCausalLM(_text(len(words)))
    _settle(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def llava(folder: Path, seed: int = 0) -> Path:
    """Write a Llava of a SigLIP tower and a Llama."""
    torch.manual_seed(seed)
    words = tokenizer()
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text(len(words)),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    _settle(model)
    model.save_pretrained(folder)
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
        num_additional_image_tokens=0,
    ).save_pretrained(folder)
    return folder


def llava_next(folder: Path, seed: int = 0, layers: int = 4, width: int = 256) -> Path:
    """Write a LLaVA-NeXT whose images are one overview and four tiles: about 740 image tokens each."""
    torch.manual_seed(seed)
    words = tokenizer()
    text = _text(len(words))
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 2 * width, layers
    text.head_dim = width // text.num_attention_heads
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=96, patch_size=8
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_grid_pinpoints=[[192, 192]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaNextForConditionalGeneration(config)
    _settle(model)
    model.save_pretrained(folder)
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_grid_pinpoints=[[192, 192]]
    )
    LlavaNextProcessor(
        image_processor=pixels,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
