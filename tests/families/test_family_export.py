"""An exported decision template renders the prompt of training, token for token, or is not written."""

import pytest
from stock_forward import STYLE
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.server_scoring import decision_request
from recbole_mllm.training.model_export import Question, copy_own_files, write_decision

NONE = {"paligemma": "no chat template"}


@pytest.mark.parametrize("item_first", [True, False])
def test_the_template_renders_the_prompts_of_training(mllm, folder, sees, prompts, item_first, tmp_path):
    copy_own_files(str(folder), tmp_path, mllm)
    why = write_decision(mllm, Question(STYLE, item_first, True), tmp_path)
    family = next((name for name in NONE if folder.name.startswith(name)), None)
    assert (NONE[family] in why) if family else not why
    assert (tmp_path / "decision_template.jinja").exists() == (tmp_path / "decision.json").exists() == (not why)
    if why:
        return
    config = DecisionConfig.from_pretrained(str(tmp_path))
    processor = load_processor(str(tmp_path)) if sees else AutoTokenizer.from_pretrained(str(tmp_path))
    for prompt in prompts:
        ((inputs, (question,)),) = config.prepare_inputs(decision_request("m", prompt), processor)
        assert inputs["input_ids"][0].tolist() == list(mllm.encoder(prompt).ids)
        answers = mllm.answers(STYLE)
        read = [processor_ids(processor, label) for label in question.labels]
        assert read == [[answers.yes[0]], [answers.no[0]]] and question.options == ["true", "false"]
    decode = mllm.encoder.tokenizer.decode
    special = set(mllm.encoder.tokenizer.all_special_ids) | set(mllm.encoder.tokenizer.get_added_vocab().values())
    tame, hostile = (
        config.prepare_inputs(decision_request("m", recommend_prompt(STYLE, "x", title, None)), processor)[0][0]
        for title in ("a mug", " ".join(mllm.encoder.spellings))
    )
    kept = [
        [i for i in inputs["input_ids"][0].tolist() if i in special and decode(i).strip()] for inputs in (tame, hostile)
    ]
    assert kept[0] == kept[1]


def processor_ids(processor, text):
    return getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"]
