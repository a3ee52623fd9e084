"""Recurrent user summaries: this project's way beside the released code's, one user at a time, on one model in one run.

32 users with histories of 3 to 14 items (blocks of three, 101 prompts of about 320 tokens); answers end where the model
ends them, at 96 tokens at the latest. The model is a small Llama with random weights, scaled so that what it writes
depends on what it reads. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recbole_mllm.common.prompts import Style, item_line, preference_prompt
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.atomic import clean
from recbole_mllm.data.item_table import Items
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Answer, Decoding
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.quality import cut_at_sentence
from recbole_mllm.summaries.store import Store
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences

STYLE = Style.from_mapping("video", yaml.safe_load((PROPERTIES / "prompt" / "video.yaml").read_text()))
SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()) | {"mllm": "tiny"})
LENGTH, BLOCK = 96, 3
Texts = dict[tuple[str, int], str]


def write_model(folder: Path) -> Path:
    """Write a Llama of four layers and width 256."""
    torch.manual_seed(0)
    tiny_models.llama(folder)  # for its tokenizer; the model is written over
    words = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    ends = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=4, max_position_embeddings=2048, **sizes, **ends)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def world(users: int) -> tuple[dict[str, list[str]], Items]:
    """Return histories of different lengths, and titles."""
    histories = {f"u{u}": [f"i{(7 * u + n) % 90}" for n in range(3 + 5 * u % 12)] for u in range(users)}
    return histories, Items({f"i{n}": f"video {n} of colour {n % 7} and kind {n % 5}" for n in range(90)}, {})


@torch.inference_mode()
def one_at_a_time(model: HFModel, histories: dict[str, list[str]], items: Items) -> Texts:
    """Write each user's blocks one after the other, a prompt a call, as the released code does."""
    texts: Texts = {}
    for user, history in histories.items():
        previous = None
        for start in range(0, len(history), BLOCK):
            block = history[start : start + BLOCK]
            prompt = preference_prompt(STYLE, [item_line(STYLE, items.title(i), "") for i in block], previous)
            ids = torch.tensor([model.encoder(prompt).ids])
            out = model.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH,
                do_sample=False,
                pad_token_id=model.encoder.tokenizer.pad_token_id,
            )
            new = out[0, ids.size(1) :]
            text = model.encoder.tokenizer.decode(new, skip_special_tokens=True).strip()
            answer = Answer(text, ids.size(1), len(new), truncated=int(new[-1]) != model.encoder.tokenizer.eos_token_id)
            previous = clean(cut_at_sentence(answer))
            texts[user, start + len(block)] = previous
    return texts


def ours(model: HFModel, histories: dict[str, list[str]], items: Items) -> Texts:
    """Write them through the store, all chains side by side."""
    plan = SummaryRequests(
        histories, {user: set(range(BLOCK, len(h), BLOCK)) | {len(h)} for user, h in histories.items()}
    )
    settings = replace(SETTINGS.summary, block_size=BLOCK, item_summary="none", max_history=None)
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name) / "store.sqlite")
        scribe = CachedGenerator("user", lambda: model, model.identity, store, Decoding(LENGTH))
        texts = preferences(scribe, STYLE, items, {}, plan, settings)
        store.close()
    return {(user, state.seen): text for (user, state), text in texts.items()}


def timed(run: Callable[[], Texts]) -> tuple[float, Texts]:
    """Return CPU seconds, which a busy machine disturbs least, and the texts."""
    started = time.process_time()
    texts = run()
    return time.process_time() - started, texts


def main() -> None:
    """Write the same summaries both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="128 users")
    users = 128 if parser.parse_args().full else 32
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = HFModel(str(write_model(Path(name))), SETTINGS.mllm, torch.device("cpu"), slots=32)
        histories, items = world(users)
        ours(model, *world(4))  # a first pass that warms caches and allocators
        slow, expected = timed(lambda: one_at_a_time(model, histories, items))
        quick, texts = timed(lambda: ours(model, histories, items))
    print(f"{len(expected)} summaries, {len(set(expected.values()))} different: {slow:.1f} s and {quick:.1f} s")
    print(json.dumps({"ratio": round(slow / quick, 2), "same_text": texts == expected}))


if __name__ == "__main__":
    main()
