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
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from jinja2 import Template
from PIL import Image
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig, label_token_ids

from recbole_mllm.common.checkpoint import find_checkpoint, read_checkpoint
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
from recbole_mllm.common.hub import license_of, push
from recbole_mllm.common.model_names import gguf_of, is_same, is_server, revision_of, source_of
from recbole_mllm.common.prompts import IMAGE, Prompt, Style, recommend_prompt
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import MLLMSettings, Settings
from recbole_mllm.mllm.encoder import AnswerTokens
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.lora import check_finetune, load_trained_state, tune
from recbole_mllm.mllm.server_scoring import decision_request
from recbole_mllm.model.summarizers import load_style

_CPU = torch.device("cpu")
_TEMPLATES = Path(__file__).parent / "templates"
_MARKS = ("<%", "%>", "<<", ">>", "<#", "#>")
_LIBRARY = {"model": "transformers", "adapter": "peft"}


def export(run: str, out: Path, *, merge: bool, record: Mapping[str, Any] | None = None, shared: bool = False) -> Path:
    """Write what `run` trained into `out`, all of it or nothing.

    Args:
        run: A checkpoint (``.pth``), the folder beside it, a benchmark run's folder, or its id under ``results/``.
        out: The folder; the files of an earlier export there are replaced, all others stay.
        merge: Whether an adapter is merged into its base model, so that the folder stands alone.
        record: What a benchmark recorded of the run, for the README's results; None where there is no record.
        shared: Whether others are to use it, as `push_export` sends it to them.

    Raises:
        UserError: There is no such checkpoint, its base model is not the one found now, or `out` is
            something else (`check_folder`); or, `shared`, it is an adapter of a model on this machine alone.
    """
    path = find_checkpoint(run)
    check_folder(out, EXPORT, "--out", inputs=(path,))
    settings, mllm = _load(path, merge)
    whole = merge or settings.lora.finetune in ("full", "none")
    if shared and not whole and "#" in mllm.identity:  # the digest of what is on this machine alone
        raise UserError(
            f"an adapter of {settings.mllm.mllm} is of use with that local model alone; push a whole one with --merge"
        )
    folder = Path(os.path.realpath(out))
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder.parent if is_new else folder, folder.name) as stage:
        _write(path, settings, mllm, stage, merge, record)
        if is_new:
            publish_new(stage, folder)
        else:
            publish(stage, folder, EXPORT)
    return out


def push_export(repo_id: str, folder: Path) -> str:
    """Send the files of the export in `folder`, and no other that is there, to a model's repository; return the URL.

    Raises:
        UserError: As `hub.push`.
    """
    about = json.loads((folder / EXPORT.manifest).read_text(encoding="utf-8"))
    files = [f"{one['file']}/*" if "outputs" in one else one["file"] for one in about["outputs"]]
    return push(repo_id, folder, [*files, EXPORT.manifest], kind="model")


def _load(path: Path, merge: bool) -> tuple[Settings, HFModel]:
    """Return the settings of the checkpoint's run and the model as it was trained, on the CPU.

    A base in four bits is loaded in its own precision, which is all an adapter's folder takes; to be merged, it is
    what those four bits stand for, as that is what the adapter was trained on.
    """
    checkpoint = read_checkpoint(path, _CPU)
    if checkpoint["config"]["model"] != MLLM:
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
        mllm.replace_model(mllm.model.dequantize().requires_grad_(False))
    if lora.finetune != "none":
        mllm.replace_model(tune(mllm.model, lora, 0, revision_of(name)))
        load_trained_state(mllm.model, dict(checkpoint["state_dict"]))
    mllm.model.eval()
    return settings, mllm


def _write(
    path: Path, settings: Settings, mllm: HFModel, folder: Path, merge: bool, record: Mapping[str, Any] | None
) -> None:
    """Write the model of the checkpoint at `path`, and what says how it is asked, into an empty `folder`."""
    recommend = settings.recommend
    question = Question(load_style(settings), recommend.prompt_order == "item-first", recommend.use_image)
    name, revision = settings.mllm.mllm, settings.mllm.revisions()["mllm_revision"]
    base, _, dtype = mllm.identity.removesuffix(":nf4").rpartition(":")
    mllm_source = settings.mllm.source("mllm")
    kind = write_model(mllm, mllm_source, folder, merge=merge)
    why = write_decision(mllm, question, folder)
    if kind == "adapter":  # with a config.json, transformers would look for whole weights here
        for config in _CONFIGS:
            remove_file(folder / config)
    if why:
        logging.getLogger().warning(
            f"no decision_template.jinja: {why}; servers that give logprobs score it all the same"
        )
    about = {
        "written_by": "recbole-mllm",
        "kind": kind,
        "checkpoint": path.name,
        "base": base if Path(name).exists() else name,  # never a path
        "base_identity": base,
        "base_revision": revision,
        "dtype": dtype,
        "finetune": settings.lora.finetune,
        "prompt_style": question.style.name,
        "prompt_order": recommend.prompt_order,
        "use_image": recommend.use_image,
        "decision_template": not why,
    }
    card = model_card(about, question.style, why, record=record, licence=license_of(_card_of(mllm_source)))
    write_text(folder / "README.md", card)
    write_text(folder / EXPORT.manifest, json.dumps(about | {"outputs": outputs_of(folder)}, indent=2) + "\n")


def _card_of(source: str) -> Path | None:
    """Return the README of the model `source`, on this machine or fetched from the hub; None where there is none."""
    place = Path(source_of(source))
    if place.exists():
        return place / "README.md" if (place / "README.md").is_file() else None
    with suppress(Exception):  # no network, no such file: the licence is not known then
        return Path(hf_hub_download(source_of(source), "README.md", revision=revision_of(source)))
    return None


def model_card(
    about: Mapping[str, Any],
    style: Style,
    why: str = "",
    *,
    record: Mapping[str, Any] | None = None,
    licence: Mapping[str, Any] | None = None,
) -> str:
    """Return the page for an export that `about` describes; `why` it has no decision template, if it has none.

    Its metadata are the hub's: the base model's id, its `licence` (as metadata) if known, and of a `record` the dataset
    and the metrics, with the digest of the candidates that they were taken on.
    """
    kind, base, tags = about["kind"], about["base"], ["recbole", "recommendation", "sequential-recommendation"]
    metadata: dict[str, Any] = dict(licence or {})
    if "#" not in about["base_identity"]:
        metadata |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    if record is not None:
        where = {"protocol": record["protocol"], "candidates": record["candidates"]}
        dataset = {"dataset_type": record["dataset"], "dataset_name": record["dataset"], "dataset_split": "test"}
        metadata |= {"datasets": [record["dataset"]], "metrics": list(record["metrics"]), "model_name": record["label"]}
        metadata["eval_results"] = [
            EvalResult(
                "recommendation", metric_type=name, metric_name=name, metric_value=value, dataset_args=where, **dataset
            )
            for name, value in record["metrics"].items()
        ]
    data = ModelCardData(library_name=_LIBRARY[kind], tags=tags, **metadata)
    words: dict[str, Any] = {"yes": style.answer_yes, "no": style.answer_no, "why": why, "record": record}
    return str(ModelCard.from_template(data, str(_TEMPLATES / "export.md"), **about, **words))


# -- weights and processor ---------------------------------------------------------------------------------------------


_CONFIGS = ("config.json", "generation_config.json")
_OWN_FILES = [
    "*token*", "*vocab*", "merges.txt", "*.model", "*.jinja", "*processor*", "chat_template*",
    "additional_chat_templates/*", "*.py", "LICENSE*", "NOTICE*", *_CONFIGS,
]  # fmt: skip
_DECISION = ("decision.json", "decision_template.jinja")
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
    copy_own_files(source, folder, mllm)
    if whole:
        (mllm.model.merge_and_unload() if adapted else mllm.model).save_pretrained(str(folder))
    else:
        mllm.model.save_pretrained(str(folder))
        remove_file(folder / "README.md")  # PEFT's, an empty form
    return "model" if whole else "adapter"


def copy_own_files(source: str, folder: Path, mllm: HFModel) -> None:
    """Copy the source's processor and tokeniser files as they are: saving a loaded processor would change some.

    Raises:
        UserError: They can be found neither here nor on the hub.
    """
    place = source_of(source)
    if gguf_of(place) is not None:  # the tokeniser stands in the weights' file
        mllm.encoder.tokenizer.save_pretrained(str(folder))
        return
    root = Path(place)
    if not root.is_dir():
        try:
            root = Path(snapshot_download(place, revision=revision_of(source), allow_patterns=_OWN_FILES))
        except (OSError, ValueError, HFValidationError) as error:
            raise UserError(f"the processor's files of {source!r} cannot be had: {error}") from error
    for pattern in _OWN_FILES:
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
    if not encoder.chat.template:
        return "the model has no chat template, behind which a question would stand"
    answers = mllm.answers(style)
    spelt = _labels(encoder.tokenizer, answers, (style.answer_yes, style.answer_no))
    if spelt is None:
        return f"the tokeniser has no single tokens for {style.answer_yes!r} and {style.answer_no!r}"
    begin = "{{ bos_token }}" if encoder.tokenizer.bos_token else ""
    why = ""
    # transformers' guard of user text fails on some processors: the template then guards it; a tokeniser that puts a
    # token in front itself is told not to for a template, which then writes it
    for guard, start in product(((), encoder.spellings), dict.fromkeys(("", begin, f"{begin} "))):
        template = _decision_template(mllm, question, start, guard)
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
                    return f"the prompt about {title!r} has other tokens than in training"
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


# -- the question's template -------------------------------------------------------------------------------------------


def _decision_template(mllm: HFModel, question: Question, start: str, guard: Sequence[str]) -> str:
    """Return the text of a template in which the model's own chat template follows the question.

    Args:
        mllm: The model.
        question: The wording of a `state` that is a mapping.
        start: What stands before all of it, where the tokeniser puts a token in front that the chat template lacks.
        guard: Spellings the template itself is to keep plain text, the longest first.
    """
    style, own, lead = question.style, mllm.encoder.chat.template, mllm.encoder.chat.lead
    order = "item-first" if question.item_first else "user-first"
    name = f"recommend_{order.replace('-', '_')}"
    system = mllm.encoder.chat.turn("system", [style.recommend_system]) if style.recommend_system else None
    # a template that writes a template has marks of its own
    outer = Template((_TEMPLATES / "decision.jinja").read_text(encoding="utf-8"), *_MARKS, trim_blocks=True)
    rendered: str = outer.render(
        style=repr(style.name),
        order=order,
        with_image=_content(getattr(style, name)),
        without_image=_content(getattr(style, f"{name}_without_image")),
        guard=json.dumps(list(guard), ensure_ascii=False) if guard else "",
        sees=mllm.encoder.processor is not None,
        system=json.dumps(system, ensure_ascii=False) if system else "",
        start=start,
        # the newline that ends a template is none of its text, but would be one of text in front of something else
        chat_template=own.removesuffix("\n") if lead else own,
        lead=f"{{{{ {json.dumps(lead, ensure_ascii=False)} }}}}" if lead else "",
    )
    return rendered


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
