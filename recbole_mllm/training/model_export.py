"""``recbole-mllm export``: from a run to a folder that transformers and servers load.

It holds weights, processor, a README, and a ``decision_template.jinja`` that renders this project's question for
servers that answer typed decisions. Such a server hands the template one variable, the request's `state`:

- a text: the question as it stands, each image at the placeholder `assets` names. This is what this project sends;
- ``{"title": …, "preference": …, "image": PLACEHOLDER}``: filled into the style's own wording, for anyone else.

Behind that stands the model's own chat template, word for word, with the question as the user's only turn.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig, label_token_ids

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import (
    EXPORT,
    check_folder,
    outputs_of,
    publish,
    publish_new,
    remove_file,
    staged,
    write_text,
)
from recbole_mllm.common.model_names import gguf_of, is_same, is_server, revision_of, source_of
from recbole_mllm.common.prompts import IMAGE, Prompt, Style, recommend_prompt
from recbole_mllm.common.settings import MLLMSettings, Settings
from recbole_mllm.mllm.encoder import AnswerTokens
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.lora import check_finetune, dequantized, load_trained_state, tune
from recbole_mllm.mllm.server_scoring import decision_request
from recbole_mllm.model.summarizers import load_style
from recbole_mllm.training.checkpoint import find_checkpoint, read_checkpoint

_CPU = torch.device("cpu")


def export(run: str, out: Path, *, merge: bool) -> Path:
    """Write what `run` trained into `out`, all of it or nothing.

    Args:
        run: A checkpoint (``.pth``), the folder beside it, a benchmark run's folder, or its id under ``results/``.
        out: The folder; the files of an earlier export there are replaced, all others stay.
        merge: Whether an adapter is merged into its base model, so that the folder stands alone.

    Raises:
        UserError: There is no such checkpoint, its base model is not the one found now, or `out` is
            something else (`check_folder`).
    """
    path = find_checkpoint(run)
    check_folder(out, EXPORT, "--out", inputs=(path,))
    settings, mllm = _load(path, merge)
    folder = Path(os.path.realpath(out))
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder.parent if is_new else folder, folder.name) as stage:
        _write(path, settings, mllm, stage, merge)
        if is_new:
            publish_new(stage, folder)
        else:
            publish(stage, folder, EXPORT)
    return out


def _load(path: Path, merge: bool) -> tuple[Settings, HFModel]:
    """Return the settings of the checkpoint's run and the model as it was trained, on the CPU.

    A base in four bits is loaded in its own precision, which is all an adapter's folder takes; to be merged, it is
    what those four bits stand for, as that is what the adapter was trained on.
    """
    checkpoint = read_checkpoint(path, _CPU)
    if checkpoint["config"]["model"] != "MLLMMSR":
        raise UserError(f"{path} is a checkpoint of {checkpoint['config']['model']}; only MLLMMSR is exported")
    settings = Settings.from_config(checkpoint["config"])
    if is_server(settings.mllm.mllm):
        raise UserError(f"{path}: its model is behind a server, so there is nothing here to export")
    trained_on = str((checkpoint.get("other_parameter") or {}).get("base", "")).removesuffix(":nf4")
    base, _, dtype = trained_on.rpartition(":")
    one_place = {"dtype": dtype, "device_map": None, "max_memory": None, "offload_folder": None}
    lora, chosen = settings.lora, MLLMSettings.from_config({**asdict(settings.mllm), **one_place})
    four_bit = merge and lora.finetune == "qlora"
    if four_bit:
        check_finetune(lora, _CPU)
    name = settings.mllm.source("mllm")
    mllm = HFModel(name, chosen, _CPU, four_bit=four_bit)
    if not is_same(trained_on, mllm.identity.removesuffix(":nf4")):
        raise UserError(f"{path} belongs to {base}, not to {mllm.identity}; put that model back in its place")
    if four_bit:
        mllm.replace_model(dequantized(mllm.model))
    if lora.finetune != "none":
        mllm.replace_model(tune(mllm.model, lora, 0, revision_of(name)))
        load_trained_state(mllm.model, dict(checkpoint["state_dict"]))
    mllm.model.eval()
    return settings, mllm


def _write(path: Path, settings: Settings, mllm: HFModel, folder: Path, merge: bool) -> None:
    """Write the model of the checkpoint at `path`, and what says how it is asked, into an empty `folder`."""
    recommend = settings.recommend
    question = Question(load_style(settings), recommend.prompt_order == "item-first", recommend.use_image)
    name, revision = settings.mllm.mllm, settings.mllm.revisions()["mllm_revision"]
    base, _, dtype = mllm.identity.removesuffix(":nf4").rpartition(":")
    kind = write_model(mllm, settings.mllm.source("mllm"), folder, merge=merge)
    why = write_decision(mllm, question, folder)
    if kind == "adapter":  # with a config.json, transformers would look for whole weights here
        for config in CONFIGS:
            remove_file(folder / config)
    if why:
        logging.getLogger().warning(
            f"no decision_template.jinja: {why}; servers that give logprobs score it all the same"
        )
    about = {
        "written_by": "recbole-mllm",
        "kind": kind,
        "checkpoint": path.name,
        "base": name,
        "base_identity": base,
        "base_revision": revision,
        "dtype": dtype,
        "finetune": settings.lora.finetune,
        "prompt_style": question.style.name,
        "prompt_order": recommend.prompt_order,
        "use_image": recommend.use_image,
        "decision_template": not why,
    }
    write_text(folder / "README.md", _readme(about, question.style, why))
    write_text(folder / EXPORT.manifest, json.dumps(about | {"outputs": outputs_of(folder)}, indent=2) + "\n")


# -- weights and processor ---------------------------------------------------------------------------------------------


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
            root = Path(snapshot_download(place, revision=revision_of(source), allow_patterns=wanted))
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
    spelt = _labels(encoder.tokenizer, answers, (style.answer_yes, style.answer_no))
    if spelt is None:
        return f"the tokeniser has no single tokens for {style.answer_yes!r} and {style.answer_no!r}"
    begin = "{{ bos_token }}" if encoder.tokenizer.bos_token else ""
    why, sees = "", encoder.processor is not None
    # transformers' guard of user text fails on some processors: the template then guards it; a tokeniser that puts a
    # token in front itself is told not to for a template, which then writes it
    for guard, start in product(((), encoder.spellings), dict.fromkeys(("", begin, f"{begin} "))):
        template = _decision_template(
            own, style, item_first=question.item_first, sees=sees, start=start, guard=guard, lead=encoder.turns.lead
        )
        config = DecisionConfig(labels={"noul": spelt}, chat_template=template, sanitize_control_tokens=not guard)
        config.save_pretrained(folder)
        # also in the JSON, for servers that are given one by --decision-config (an adapter's, say)
        written = json.loads((folder / _DECISION[0]).read_text(encoding="utf-8")) | {"chat_template": template}
        write_text(folder / _DECISION[0], json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        found = _difference(mllm, question, folder)
        if not found:
            return ""
        why = why or found
    for name in _DECISION:
        remove_file(folder / name)
    return why


def _difference(mllm: HFModel, question: Question, folder: Path) -> str:
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
            body = decision_request("m", prompt)
            image = {"image": next(iter(body["assets"]))} if body["assets"] else {}
            state = {"title": title, "preference": _PREFERENCE} | image
            # as this project asks, and leaving the wording to the template
            for asked in (body, body | {"state": state}):
                try:
                    ((inputs, _),) = config.prepare_inputs(asked, processor)
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


def _parting(tokenizer: Any, found: Sequence[int], wanted: Sequence[int]) -> str:
    at = next((i for i, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), len(wanted))
    words = [" ".join(tokenizer.decode(list(ids)[max(0, at - 3) : at + 5]).split()) for ids in (found, wanted)]
    return f"token {at} on, {words[0]!r} is not {words[1]!r}"


# -- the question's template -------------------------------------------------------------------------------------------

_HEAD = """\
{{#- Written by recbole-mllm: the question of prompt style {style!r}, {order}. `state` is the question itself, or a
mapping with `title`, `preference` and, where the item has one, `image`. -#}}
{{%- if state is mapping and state.image -%}}{{%- set content = {with_image} -%}}
{{%- elif state is mapping -%}}{{%- set content = {without_image} -%}}
{{%- elif state is string -%}}{{%- set content = [{{"type": "text", "text": state}}] -%}}
{{%- else -%}}{{%- set content = state -%}}
{{%- endif -%}}
"""
# Where the pipeline's own guard fails on a processor: special tokens' spellings are cut; it drops `<|split|>` again
_GUARD = """\
{{%- set guarded = namespace(parts=[]) -%}}
{{%- for part in content -%}}
  {{%- if part.type == "text" -%}}
    {{%- set cut = namespace(text=part.text) -%}}
    {{%- for word in {words} -%}}
      {{%- set cut.text = cut.text.replace(word, word[0] ~ "<|split|>" ~ word[1:]) -%}}
    {{%- endfor -%}}
    {{%- set part = {{"type": "text", "text": cut.text}} -%}}
  {{%- endif -%}}
  {{%- set guarded.parts = guarded.parts + [part] -%}}
{{%- endfor -%}}
{{%- set content = guarded.parts -%}}
"""
# As prompts are rendered here; the pipeline does not say so to every processor
_NO_THINKING = "{%- set enable_thinking = false -%}\n"
_PARTS = '{% set messages = [{"role": "user", "content": content}] %}\n'
_TEXT = '{% set messages = [{"role": "user", "content": content[0].text}] %}\n'


def _decision_template(
    chat_template: str,
    style: Style,
    *,
    item_first: bool,
    sees: bool,
    start: str = "",
    guard: Sequence[str] = (),
    lead: str = "",
) -> str:
    """Return the template's text.

    Args:
        chat_template: The model's own.
        style: The wording of a `state` that is a mapping.
        item_first: Which of the style's two orders.
        sees: Whether the chat template takes parts of text and images (a processor's), or a bare text (a tokeniser's).
        guard: Spellings the template itself is to keep plain text, the longest first.
        start: What stands before all of it, where the tokeniser puts a token in front that the chat template lacks.
        lead: What stands behind its generation prompt, before every answer.
    """
    order = "item-first" if item_first else "user-first"
    name = f"recommend_{order.replace('-', '_')}"
    head = _HEAD.format(
        style=style.name,
        order=order,
        with_image=_content(getattr(style, name)),
        without_image=_content(getattr(style, f"{name}_without_image")),
    )
    quiet = _NO_THINKING if "enable_thinking" in chat_template else ""
    own = _GUARD.format(words=json.dumps(list(guard), ensure_ascii=False)) if guard else ""
    # the newline that ends a template is none of its text, but would be one of text in front of something else
    ending = f"{{{{ {json.dumps(lead, ensure_ascii=False)} }}}}" if lead else ""
    template = chat_template.removesuffix("\n") if lead else chat_template
    return head + own + quiet + (_PARTS if sees else _TEXT) + start + template + ending


def _content(wording: str) -> str:
    """Return a Jinja list of the wording's texts and images, each text in one piece with what is filled into it."""
    texts = wording.split(IMAGE)
    parts: list[str] = []
    for number, text in enumerate(texts):
        parts += ['{"type": "image"}'] if number else []
        parts += [f'{{"type": "text", "text": {" ~ ".join(_pieces(text))}}}'] if text else []
    return f"[{', '.join(parts)}]"


def _pieces(text: str) -> Iterator[str]:
    for literal, name, _, _ in string.Formatter().parse(text):
        if literal:
            yield json.dumps(literal, ensure_ascii=False)
        if name is not None:
            yield f"state.{name}"


def _labels(tokenizer: Any, answers: AnswerTokens, words: tuple[str, str]) -> list[str] | None:
    """Return spellings of Yes and No that the tokeniser turns into the very tokens that are scored, or None.

    Often that is a space and the word: the token behind a prompt that ends in no space.
    """
    found = []
    for (first, *_), word in zip((answers.yes, answers.no), words, strict=True):
        spellings = (word, f" {word}", tokenizer.decode([first]), tokenizer.convert_ids_to_tokens(first))
        found += [s for s in spellings if tokenizer(s, add_special_tokens=False)["input_ids"] == [first]][:1]
    return found if len(found) == len(words) else None


# -- the README --------------------------------------------------------------------------------------------------------

_SERVE = {
    "model": """\
```bash
transformers serve "$PWD" --port 8000                                  # its name is this folder's full path
vllm serve "$PWD" --served-model-name my-recommender --port 8000
python -m sglang.launch_server --model-path "$PWD" --served-model-name my-recommender --port 8000
```
""",
    "adapter": """\
This is a PEFT adapter: its base model is `{base}` ({base_identity}), which a server loads itself.

```bash
vllm serve {base}{at_revision} --enable-lora --lora-modules my-recommender="$PWD" --port 8000
```

`transformers serve` takes no adapter: for it, and for typed decisions, `recbole-mllm export … --merge` writes a
model that stands alone.
""",
}
_README = """\
# A recommender: would this user take this item?

Written by {written_by} from the checkpoint `{checkpoint}`.

| | |
|---|---|
| base model | `{base}` |
| its weights | `{base_identity}`, {dtype} |
| fine-tuning | {finetune} |
| prompt style | `{prompt_style}`, {prompt_order}{images} |

## Serving

{serve}
Score with it: `--mllm=server:NAME@http://localhost:8000/v1 --finetune=none --prompt_style={prompt_style} \
--prompt_order={prompt_order}`. Serve in the precision above, or scores differ by its rounding.

## Asking

{asking}"""
_ASK_DECISION = """\
`decision_template.jinja` renders the prompt of training, token for token; checked when this was written. A typed
decision (`POST /v1/systemone`) is answered with P({yes} | {yes} or {no}) in `answers.take.noul`:

```json
{body}
```

`image` and `assets` are left out for an item without one.
"""
_ASK_LOGPROBS = """\
There is no `decision_template.jinja`, as none renders the prompt of training for this model: {why}.
A chat completion with `max_tokens: 1`, `logprobs: true` and `top_logprobs: 20` tells how likely {yes} and {no} are.
"""


_FOUR_BITS = {
    "model": """\
Its linear layers hold what the four bits (NF4) of the base model in training stand for, with the adapter added: served
in the precision above, it scores as that run did.
""",
    "adapter": """\
The base model was loaded in four bits in training (bitsandbytes: NF4, double quantisation); behind a server that loads
it whole, scores differ by the rounding of those bits. `recbole-mllm export … --merge` keeps the rounded weights.
""",
}


def _readme(about: Mapping[str, Any], style: Style, why: str = "") -> str:
    """Return the page for an export that `about` describes; `why` it has no template, if it has none."""
    state = {"title": "Red mug", "preference": "The user likes red.", "image": "<image-1>"}
    asset = {"<image-1>": {"type": "image", "format": "png", "data_base64": "…"}}
    body = {"model": "NAME", "state": state, "questions": {"take": {"type": "noul"}}, "assets": asset}
    asking = (_ASK_DECISION if about["decision_template"] else _ASK_LOGPROBS).format(
        yes=style.answer_yes, no=style.answer_no, why=why, body=json.dumps(body, ensure_ascii=False, indent=2)
    )
    at_revision = f" --revision {about['base_revision']}" if about["base_revision"] else ""
    serve = _SERVE[about["kind"]].format(**about, at_revision=at_revision)
    if about["finetune"] == "qlora":
        serve += f"\n{_FOUR_BITS[about['kind']]}"
    images = ", with the item's image" if about["use_image"] else ", without images"
    return _README.format(**about, images=images, serve=serve, asking=asking)
