"""The presets of models: each is of a tested family, and costs what docs/backbones.md says; the reranker's prompts."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from released_models import FILES, RELEASED, image_tokens, sizes_of
from stock_forward import CPU, KEYS, SETTINGS
from tiny_models import llama, qwen3_vl
from transformers import AutoModelForImageTextToText

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import IMAGE, read_style, recommend_prompt
from recbole_mllm.common.resources import PROPERTIES, named, resource
from recbole_mllm.common.settings import Settings
from recbole_mllm.mllm import families, scoring
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.loss import example_loss
from recbole_mllm.mllm.server_messages import messages
from recbole_mllm.plan.cost import trained_parameters, training_bytes
from recbole_mllm.training.model_export import Question, copy_own_files, write_decision

TEXT_TOKENS = 700  # a question with a preference of 256 tokens, a title and a summary's worth of room
PAGE = (PROPERTIES.parent / "docs" / "backbones.md").read_text()
ROWS = {cells[1]: cells for cells in (re.split(r"\s*\|\s*", line) for line in PAGE.splitlines()) if len(cells) == 10}


def keys_of(preset):
    return yaml.safe_load(resource("quick_start_config", preset).read_text())


def test_every_preset_of_a_model_has_its_sizes_and_its_row():
    models = {name for name in named("quick_start_config") if "/" in str(keys_of(name).get("mllm"))} - {"paper"}
    assert models == set(RELEASED) == {row.strip("`") for row in ROWS} - {"preset", ":--", "---"}


@pytest.mark.parametrize(("preset", "gigabytes", "each"), FILES)
def test_sizes_are_those_of_the_released_files(preset, gigabytes, each):
    assert sizes_of(preset)[1].weight_bytes(each) / 1e9 == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize("preset", RELEASED)
def test_a_preset_costs_what_its_page_says_and_is_of_a_tested_family(preset):
    keys = keys_of(preset)
    settings = Settings.from_config(KEYS | keys)
    model, sizes = sizes_of(preset)
    row = families._FAMILIES[model.config.model_type]
    assert model.config.get_text_config().model_type in row.texts
    shown, rows = image_tokens(preset), settings.train.micro_batch_size
    trained = trained_parameters(model, settings.lora)
    need = sizes.weight_bytes(2) + 16 * trained
    need += training_bytes(sizes, 2, settings.lora, rows * (shown + TEXT_TOKENS), rows)
    found = [
        f"`{preset}`",
        f"`{keys['mllm']}`",
        f"{sizes.parameters / 1e9:.2f} B",
        f"{sizes.weight_bytes(2) / 1e9:.1f}",
    ]
    assert ROWS[f"`{preset}`"][1:8] == [*found, f"{shown:,}", f"{rows}", f"{need / 1e9:.0f}"]


# ---- the reranker

STYLE = read_style("qwen3-vl-reranker")
LABELS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    folder = qwen3_vl(tmp_path_factory.mktemp("reranker"))
    for colour, size in {"red": (40, 30), "blue": (96, 33)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{colour}.png")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["user-first", "item-first"])
def asked(request, reranker):
    shown = [reranker / "red.png", reranker / "blue.png", None]
    likes = ("likes cats", "The user appears to have a preference for dogs, and other animals")
    return [
        recommend_prompt(STYLE, like, f"mug {n}", image, item_first=request.param)
        for like in likes
        for n, image in enumerate(shown)
    ]


def released(processor, prompt):
    """Return the ids of the messages that the released code makes of a pair (format_mm_instruction)."""
    instruct, query, document = re.fullmatch(
        r"<Instruct>: (.*?)<Query>:(.*)\n<Document>:(.*)", prompt.text, re.DOTALL
    ).groups()

    def content(prefix, text):
        picture = [{"type": "image", "image": Image.open(prompt.images[0])}] if IMAGE in text else []
        return [{"type": "text", "text": prefix}, *picture, {"type": "text", "text": text.replace(IMAGE, "")}]

    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    user = [{"type": "text", "text": f"<Instruct>: {instruct}"}]
    user += [*content("<Query>:", query), *content("\n<Document>:", document)]
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": user}]
    return processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def test_a_reranker_is_asked_and_scores_as_by_its_released_code(reranker, asked, monkeypatch):
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    mllm = HFModel(str(reranker), SETTINGS.mllm, CPU)
    stock = AutoModelForImageTextToText.from_pretrained(reranker).eval()
    answers, words = mllm.answers(STYLE), mllm.encoder.tokenizer
    yes, no = (words(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    assert (answers.yes[0], answers.no[0]) == (yes, no)
    head = stock.lm_head.weight[yes] - stock.lm_head.weight[no]
    expected = []
    for prompt in asked:
        inputs = released(mllm.encoder.processor, prompt)
        assert list(mllm.encoder(prompt).ids) == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected.append(stock.model(**inputs).last_hidden_state[0, -1] @ head)
    expected = torch.stack(expected)
    assert expected.std() > 1e-3
    for share in (True, False):
        found = mllm.yes_scores(asked, answers, share_prefix=share)
        assert (found.sigmoid() - expected.sigmoid()).abs().max() < 1e-5


def test_a_reranker_is_fine_tuned_on_the_question_it_is_scored_by(reranker, asked):
    mllm = HFModel(str(reranker), SETTINGS.mllm, CPU)
    mllm.replace_model(tune(mllm.model, replace(SETTINGS.lora, lora_dropout=0.0), 1))
    losses = []
    for prompt, label in zip(asked, LABELS.tolist(), strict=True):
        answer, start = "yes" if label else "no", len(mllm.encoder(prompt).ids)
        turns = released(mllm.encoder.processor, prompt)
        words = mllm.encoder.tokenizer(f"{answer}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        ids = torch.cat([turns["input_ids"][0], torch.tensor(words)])
        inputs = dict(turns) | {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if (kinds := inputs.get("mm_token_type_ids")) is not None:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(words)))
        places = torch.arange(start, len(ids))
        logits = mllm.backbone.head_model(**inputs).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[places - 1], ids[places]))
    examples = mllm.examples(asked, LABELS, mllm.answers(STYLE))
    for share in (True, False):
        loss = example_loss(mllm.backbone, examples, share=share)
        assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-5)


def test_an_export_and_a_chat_server_ask_the_rerankers_question(reranker, asked, tmp_path):
    mllm = HFModel(str(reranker), SETTINGS.mllm, CPU)
    copy_own_files(str(reranker), tmp_path, mllm)
    item_first = asked[0].text.startswith("<Instruct>: Given an item")
    # "" says that the template's tokens are those of training
    assert write_decision(mllm, Question(STYLE, item_first, True), tmp_path) == ""
    system, user = messages(asked[0])
    assert (system["role"], system["content"], user["role"]) == ("system", STYLE.recommend_system, "user")


def test_a_model_without_a_place_for_a_system_message_is_refused(tmp_path):
    mllm = HFModel(str(llama(tmp_path)), SETTINGS.mllm, CPU)
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    mllm.encoder.tokenizer.chat_template = users
    with pytest.raises(UserError, match="no place for the prompt style's recommend_system"):
        mllm.encoder(recommend_prompt(STYLE, "likes cats", "a mug", None))
