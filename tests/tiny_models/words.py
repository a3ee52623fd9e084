"""Real tokenisers of a few hundred tokens, trained once a process: byte-level BPE and SentencePiece."""

import io
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The user prefers red colour. Will the user buy it? Answer Yes or No.",
    "Candidate: blue car and red car. Yes No Yes No",
    "Describe the product in the image. Summarize the preference. Update the preference.",
    "USER: the user bought a mug ASSISTANT: Yes\nUser: the title Assistant: No\nmodel\nuser\nsystem\n",
]


def byte_level(special: Sequence[str], template: str | None, **named: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokeniser whose first ids are `special`; `named` are its named tokens (``bos_token``)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(tuple(special))),
        padding_side="left",
        chat_template=template,
        **{"extra_special_tokens": [word for word in special if word not in named.values()]} | named,
    )


@cache
def _trained(special: tuple[str, ...]) -> str:
    bare = Tokenizer(models.BPE(unk_token=None))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    bare.train_from_iterator(CORPUS, trainer)
    return str(bare.to_str())


def llama_sentencepiece(template: str | None, **named: Any) -> LlamaTokenizer:
    """Return Llama's tokeniser over a SentencePiece model: a space before the first word, bytes for unknown letters."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(_sentencepiece(dummy_prefix=True))
        words = LlamaTokenizer.from_pretrained(folder, **{"add_bos_token": True, "legacy": False} | named)
    words.chat_template = template
    return words


def gemma_sentencepiece(template: str | None, **named: Any) -> GemmaTokenizer:
    """Return Gemma's tokeniser over a SentencePiece model: no space before the first word, newlines joined."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(_sentencepiece(dummy_prefix=False))
        words = GemmaTokenizer.from_pretrained(folder, add_bos_token=True, **named)
    words.chat_template = template
    return words


@cache
def _sentencepiece(dummy_prefix: bool) -> bytes:
    out = io.BytesIO()
    gemma: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"}
    gemma |= {"bos_piece": "<bos>", "eos_piece": "<eos>", "user_defined_symbols": ["\n\n", "\n\n\n", "<b>"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines()] * 4),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
        **({} if dummy_prefix else gemma),
    )
    return out.getvalue()
