"""Write a model as a folder that transformers and servers load: weights, processor, and the question's template."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig, label_token_ids

from recbole_mllm.errors import UserError
from recbole_mllm.files import remove_file, write_text
from recbole_mllm.mllm.decision import decision_request
from recbole_mllm.mllm.decision_template import decision_template, labels
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.processors import load_processor
from recbole_mllm.mllm.sources import gguf_of, source_of
from recbole_mllm.prompts import Prompt, Style, recommend_prompt

_OWN_FILES = (
    "*token*", "*vocab*", "merges.txt", "*.model", "*.jinja", "*processor*", "chat_template*",
    "additional_chat_templates/*", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
_DECISION = ("decision.json", "decision_template.jinja")
CONFIGS = ("config.json", "generation_config.json")
_TITLE, _PREFERENCE = "A red mug, 2 pieces: \"café\" & 'tea'", "The user appears to like red.\nAnd long walks, too."


@dataclass(frozen=True, slots=True)
class Question:
    """What a recommender's prompts are worded by."""

    style: Style
    item_first: bool
    use_image: bool


def write_model(mllm: HFModel, source: str, folder: Path, *, merge: bool) -> str:
    """Write weights and the source's own processor files into `folder`; return ``adapter`` or ``model``."""
    adapted = hasattr(mllm.model, "peft_config")
    whole = merge or not adapted
    copy_own_files(source, folder, mllm, () if whole else CONFIGS)
    if whole:
        (mllm.model.merge_and_unload() if adapted else mllm.model).save_pretrained(str(folder))
    else:
        mllm.model.save_pretrained(str(folder))
        remove_file(folder / "README.md")  # PEFT's, an empty form
    return "model" if whole else "adapter"


def copy_own_files(source: str, folder: Path, mllm: HFModel, more: Sequence[str] = ()) -> None:
    """Copy the source's processor and tokeniser files as they are: saving a loaded processor would change some.

    Raises:
        UserError: They can be found neither here nor on the hub.
    """
    place = source_of(source)
    if gguf_of(place) is not None:  # the tokeniser stands in the weights' file
        mllm.encoder.tokenizer.save_pretrained(str(folder))
        return
    wanted = [*_OWN_FILES, *more]
    root = Path(place)
    if not root.is_dir():
        try:
            root = Path(snapshot_download(place, allow_patterns=wanted))
        except (OSError, ValueError, HFValidationError) as error:
            raise UserError(f"the processor's files of {source!r} cannot be had: {error}") from error
    for pattern in wanted:
        for path in root.glob(pattern):
            if path.is_file() and path.name not in _DECISION:
                target = folder / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def write_decision(mllm: HFModel, question: Question, folder: Path) -> str:
    """Write the template and its settings into `folder`, which holds the processor, once they are right.

    Return why there are none, where this model allows no template that renders the prompt of training token for token,
    or no spelling that reads its answers' tokens; "" where all is well.
    """
    encoder, style = mllm.encoder, question.style
    if not (own := encoder.turns.template):
        return "the model has no chat template, behind which a question would stand"
    answers = mllm.answers(style)
    spelt = labels(encoder.tokenizer, answers, (style.answer_yes, style.answer_no))
    if spelt is None:
        return f"the tokeniser has no single tokens for {style.answer_yes!r} and {style.answer_no!r}"
    begin = "{{ bos_token }}" if encoder.tokenizer.bos_token else ""
    why, sees = "", encoder.processor is not None
    # transformers' guard of user text fails on some processors: the template then guards it; a tokeniser that puts a
    # token in front itself is told not to for a template, which then writes it
    for guard, start in product(((), encoder.spellings), dict.fromkeys(("", begin, f"{begin} "))):
        template = decision_template(
            own, style, item_first=question.item_first, sees=sees, start=start, guard=guard, lead=encoder.turns.lead
        )
        config = DecisionConfig(labels={"noul": spelt}, chat_template=template, sanitize_control_tokens=not guard)
        _write_config(config, folder)
        found = difference(mllm, question, folder)
        if not found:
            return ""
        why = why or found
    for name in _DECISION:
        remove_file(folder / name)
    return why


def _write_config(config: DecisionConfig, folder: Path) -> None:
    config.save_pretrained(folder)
    # also in the JSON, for servers that are given one by --decision-config (an adapter's, say)
    settings = json.loads((folder / _DECISION[0]).read_text(encoding="utf-8")) | {"chat_template": config.chat_template}
    write_text(folder / _DECISION[0], json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def difference(mllm: HFModel, question: Question, folder: Path) -> str:
    """Say where the exported template's tokens part from those of training; "" where they do not."""
    config = DecisionConfig.from_pretrained(str(folder))
    sees = mllm.encoder.processor is not None
    processor = load_processor(str(folder)) if sees else AutoTokenizer.from_pretrained(str(folder))
    tokenizer = getattr(processor, "tokenizer", processor)
    answers = mllm.answers(question.style)
    if label_token_ids(tokenizer, tuple(config.labels["noul"])) != [answers.yes[0], answers.no[0]]:
        return "the answers are other tokens"
    with TemporaryDirectory() as scratch:
        hostile = " ".join(mllm.encoder.spellings)
        for title, prompt in _probes(question, sees and question.use_image, Path(scratch), hostile):
            wanted = list(mllm.encoder(prompt).ids)
            for body in _bodies(prompt, title):
                try:
                    ((inputs, _),) = config.prepare_inputs(body, processor)
                except (ValueError, NotImplementedError) as error:  # transformers cannot guard this processor's texts
                    return str(error)
                found = inputs["input_ids"][0].tolist()
                # where transformers guards special tokens' spellings, they are cut in other places than here
                if found != wanted and not (title == hostile and config.sanitize_control_tokens):
                    return _parting(tokenizer, found, wanted)
    return ""


def _probes(question: Question, with_image: bool, folder: Path, hostile: str) -> list[tuple[str, Prompt]]:
    """Return titles in questions without an image, and with images of two shapes; `hostile` is a title too."""
    images: list[Path | None] = [None]
    for size in ((48, 64), (90, 33)) if with_image else ():
        images.append(folder / f"{size[0]}.png")
        Image.new("RGB", size, "red").save(folder / f"{size[0]}.png")
    return [
        (title, recommend_prompt(question.style, _PREFERENCE, title, image, item_first=question.item_first))
        for title, image in product((_TITLE, hostile), images)
    ]


def _bodies(prompt: Prompt, title: str) -> list[dict[str, object]]:
    """Return the request this project sends, and the one that leaves the wording to the template."""
    body = decision_request("m", prompt)
    state = {"title": title, "preference": _PREFERENCE}
    image = {"image": next(iter(body["assets"]))} if body["assets"] else {}
    return [body, body | {"state": state | image}]


def _parting(tokenizer: object, found: Sequence[int], wanted: Sequence[int]) -> str:
    at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
    near = slice(max(0, at - 3), at + 5)
    words = [re.sub(r"\s+", " ", tokenizer.decode(list(ids)[near])) for ids in (found, wanted)]  # type: ignore[attr-defined]
    return f"token {at} on, {words[0]!r} is not {words[1]!r}"
