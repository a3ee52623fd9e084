"""Chat templates that put more before an answer than their generation prompt says: a prompt ends behind all of it."""

import pytest
import tiny_models
from stock_forward import CPU, SETTINGS, STYLE
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig

from recbole_mllm.mllm.decision import decision_request
from recbole_mllm.mllm.exporting import Question, copy_own_files, write_decision
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.prompts import recommend_prompt

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
    "channel": (
        _TURN.replace("THOUGHT", '<"final"> ') + _ASKS + "{% endif %}\n",
        'assistant\n<"final">',
    ),
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
    copy_own_files(str(folder), tmp_path, mllm, ["config.json"])
    assert write_decision(mllm, Question(STYLE, True, False), tmp_path) == ""
    config, words = DecisionConfig.from_pretrained(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    ((inputs, _),) = config.prepare_inputs(decision_request("m", PROMPT), words)
    assert inputs["input_ids"][0].tolist() == list(mllm.encoder(PROMPT).ids)
