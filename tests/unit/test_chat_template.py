"""Chat templates that put more before an answer than their generation prompt says: a prompt ends behind all of it."""

import pytest
import tiny_models
from PIL import Image
from stock_forward import CPU, SETTINGS, STYLE
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.server_scoring import decision_request
from recbole_mllm.training.model_export import Question, copy_own_files, write_decision

_TURN = "{% for m in messages %}[INST]{{ m.role }}\n{% if m.role == 'assistant' %}THOUGHT{% endif %}"
_TURN += "{{ m.content }}[/INST]\n{% endfor %}"
_ASKS = "{% if add_generation_prompt %}[INST]assistant\n"
# a thought is written unless the template is told not to (Qwen3); always, and begun for the model (its thinking kind);
# the answer's channel (gpt-oss); no generation prompt at all
QUIET = (
    _TURN.replace("THOUGHT", "<think>\n\n</think>\n\n")
    + _ASKS
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}\n"
)
TEMPLATES = {
    "quiet": (QUIET, "assistant\n<think>\n\n</think>\n\n"),
    "begun": (
        _TURN.replace("THOUGHT", "<think>\n\n</think>\n\n") + _ASKS + "<think>\n{% endif %}",
        "assistant\n<think>\n\n</think>\n\n",
    ),
    "channel": (_TURN.replace("THOUGHT", '<"final"> ') + _ASKS + "{% endif %}\n", 'assistant\n<"final">'),
    "none": (_TURN.replace("THOUGHT", ""), "[INST]assistant\n"),
}
PROMPT = recommend_prompt(STYLE, "likes cats", "a <think> mug", None)


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request, tmp_path_factory):
    folder = tiny_models.llama(tmp_path_factory.mktemp(request.param))
    template, ending = TEMPLATES[request.param]
    (folder / "chat_template.jinja").write_text(template)
    return HFModel(str(folder), SETTINGS.mllm, CPU), folder, ending


def test_a_prompt_ends_where_the_answer_itself_begins(case):
    mllm, folder, ending = case
    words = AutoTokenizer.from_pretrained(folder)
    answers = mllm.answers(STYLE)
    asked = mllm.encoder(PROMPT).ids
    assert words.decode(asked).endswith(ending)
    assert words.decode(answers.yes).lstrip().startswith("Yes") and answers.yes[0] != answers.no[0]
    chat = [{"role": "user", "content": PROMPT.text}, {"role": "assistant", "content": "Yes"}]
    told = words.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert [*asked, *answers.yes] == told == list(mllm.encoder(PROMPT, "Yes").ids)


def test_an_exported_template_ends_there_too(case, tmp_path):
    mllm, folder, _ = case
    copy_own_files(str(folder), tmp_path, mllm)
    assert write_decision(mllm, Question(STYLE, True, False), tmp_path) == ""
    config, words = DecisionConfig.from_pretrained(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    ((inputs, _),) = config.prepare_inputs(decision_request("m", PROMPT), words)
    assert inputs["input_ids"][0].tolist() == list(mllm.encoder(PROMPT).ids)


def _with(template, build, folder):
    build(folder)
    (folder / "chat_template.jinja").write_text(template)
    return HFModel(str(folder), SETTINGS.mllm, CPU)


def test_a_template_is_given_text_or_parts_whichever_it_takes(tmp_path):
    """A text model with a template of parts, and an image model with one of text, which it would write as Python."""
    parts = "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}\n{% endfor %}"
    text = _with(parts, tiny_models.llama, tmp_path / "text")
    assert PROMPT.text in text.encoder.tokenizer.decode(text.encoder(PROMPT).ids)
    assert text.answers(STYLE)
    sees = _with(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", tiny_models.llava, tmp_path / "b"
    )
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    shown = sees.encoder(recommend_prompt(STYLE, "likes cats", "a mug", tmp_path / "red.png"))
    assert shown.ids.count(sees.backbone.image_token_id) == 16
    assert "user: Candidate: <image>" in sees.encoder.tokenizer.decode(shown.ids).replace("<image>" * 16, "<image>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content", "the model's chat template fails: unexpected end"),
        ("{{ raise_exception('a system message first') }}", "the model's chat template fails: a system message first"),
        ("Hello, what can I do?", "does not write the text of a question"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, message, tmp_path):
    with pytest.raises(UserError, match=message):
        _with(template, tiny_models.llama, tmp_path).encoder(PROMPT)


def test_a_template_that_drops_the_image_is_refused(tmp_path):
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}\n{% endfor %}"
    mllm = _with(template, tiny_models.llava, tmp_path / "llava")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert mllm.encoder(PROMPT).images == ()
    with pytest.raises(UserError, match="shows 0 images of 1"):
        mllm.encoder(recommend_prompt(STYLE, "likes cats", "a mug", tmp_path / "red.png"))


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_template_that_names_today_writes_the_same_prompt_on_any_day(kind, tmp_path):
    folder = getattr(tiny_models, kind)(tmp_path / kind)
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("Today: {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + own)
    mllm = HFModel(str(folder), SETTINGS.mllm, CPU)
    asked = mllm.encoder.tokenizer.decode(mllm.encoder(PROMPT).ids)
    assert "Today: 26 Jul 2024 00:00:00.000000" in asked
    copy_own_files(str(folder), tmp_path, mllm)
    assert write_decision(mllm, Question(STYLE, item_first=True, use_image=False), tmp_path) == ""
    assert "26 Jul 2024" in (tmp_path / "decision_template.jinja").read_text()
