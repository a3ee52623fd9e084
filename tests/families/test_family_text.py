"""Prompts of every family: item text cannot break out, truncation spares what matters, answers are read in context."""

import pytest
import torch
from stock_forward import STYLE, loss_of, own_inputs, own_logits
from transformers import AutoTokenizer
from transformers.decision import DecisionConfig

from recbole_mllm.common.prompts import recommend_prompt
from recbole_mllm.mllm.loading import load_processor
from recbole_mllm.mllm.server_scoring import decision_request
from recbole_mllm.training.model_export import Question, copy_own_files, write_decision

ELSEWHERE = ["<image>", "[INST]", "[/INST]", "<|im_end|>", "<|im_start|>", "<start_of_turn>", "</s>", "<eos>", "<bos>"]
ELSEWHERE += ["<|image_pad|>", "<fake_token_around_image>", "<IMG_CONTEXT>", "<|begin_of_text|>", "<<s>", "<b>bold</b>"]


@pytest.fixture
def special(mllm):
    """Id and spelling of every special and added token; runs of newlines are ordinary text (Gemma)."""
    tokenizer = mllm.encoder.tokenizer
    added = tokenizer.get_added_vocab()
    added |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {i: word for word, i in added.items() if word.strip()}


@pytest.fixture
def limit(mllm):
    """Give the encoder room, or take it."""
    before = mllm.encoder.max_text_tokens, mllm.encoder.positions
    mllm.encoder.positions = 10**9
    yield lambda tokens: setattr(mllm.encoder, "max_text_tokens", tokens)
    mllm.encoder.max_text_tokens, mllm.encoder.positions = before


@pytest.mark.parametrize("item_first", [True, False])
def test_no_title_or_summary_breaks_out(mllm, special, sees, images, limit, item_first):
    limit(10**6)
    words = list(dict.fromkeys([*special.values(), *ELSEWHERE]))
    decode = mllm.encoder.tokenizer.decode
    for image in [images["blue"], None] if sees else [None]:
        tame = mllm.encoder(recommend_prompt(STYLE, "x", "y", image, item_first=item_first))
        own = [token for token in tame.ids if token in special]
        for text in [" ".join(words), "".join(words), "a" + words[0] + "b", words[-1]]:
            hostile = mllm.encoder(recommend_prompt(STYLE, text, text[::-1] + text, image, item_first=item_first))
            assert [token for token in hostile.ids if token in special] == own
            assert hostile.images == tame.images
            assert decode(hostile.ids).count(text) == 2 and text[::-1] in decode(hostile.ids)


def test_truncation_spares_image_question_and_answer(mllm, sees, images, limit):
    image = images["green"] if sees else None
    ask = mllm.encoder
    whole = ask(recommend_prompt(STYLE, "likes cats", "a short title", image))
    long = recommend_prompt(STYLE, "word " * 400, "a short title", image)
    marks = len(whole.ids) - sum(len(one.ids) - 1 for one in whole.images)
    before = ask.truncated
    limit(marks + 20)
    cut = ask(long)
    assert ask.truncated == before + 1
    assert len(cut.ids) <= len(whole.ids) + 20 and "a short title" in ask.tokenizer.decode(cut.ids)
    assert cut.images == whole.images
    question = ask.tokenizer("Will the user buy it? Answer Yes or No.", add_special_tokens=False)["input_ids"][2:]
    tail = whole.ids[-len(question) :]
    assert cut.ids[-len(tail) :] == tail
    for one in cut.images:
        assert any(cut.ids[i : i + len(one.ids)] == one.ids for i in range(len(cut.ids)))
    answers = mllm.answers(STYLE)
    limit(marks + 20 + len(answers.yes))
    trained = ask(long, STYLE.answer_yes)
    assert ask.truncated == before + 2 and trained.ids[-len(answers.yes) :] == answers.yes
    assert trained.ids[-len(answers.yes) - len(tail) : -len(answers.yes)] == tail


def test_answers_are_read_where_they_stand(mllm, prompts):
    answers = mllm.answers(STYLE)
    assert answers.yes[0] != answers.no[0]
    for prompt in prompts:
        asked = mllm.encoder(prompt).ids
        for word, tokens in ((STYLE.answer_yes, answers.yes), (STYLE.answer_no, answers.no)):
            inputs = own_inputs(mllm.encoder.tokenizer, mllm.encoder.processor, prompt, word)
            own = tuple(inputs["input_ids"][0].tolist())
            assert (*asked, *tokens) == own == mllm.encoder(prompt, word).ids


@pytest.mark.parametrize("whole", [False, True], ids=["answer", "whole"])
def test_the_loss_is_the_likelihood_of_the_answer_or_of_all_words(mllm, stock, prompts, whole):
    whole = whole and stock.config.model_type != "paligemma"  # it sees its whole prompt at once
    few, labels = prompts[:6], torch.tensor([1.0, 0.0] * 3)
    losses = []
    for prompt, label in zip(few, labels.tolist(), strict=True):
        word = STYLE.answer_yes if label else STYLE.answer_no
        inputs = own_inputs(mllm.encoder.tokenizer, mllm.encoder.processor, prompt, word)
        ids, start = inputs["input_ids"][0], len(mllm.encoder(prompt).ids)
        places = torch.arange(1 if whole else start, len(ids))
        places = places[ids[places] != mllm.backbone.image_token_id]
        losses.append(torch.nn.functional.cross_entropy(own_logits(stock, inputs)[places - 1], ids[places]))
    got = loss_of(mllm, few, labels, whole=whole)
    assert torch.allclose(got, torch.stack(losses).mean(), atol=1e-5)


# An exported decision template renders the prompt of training, token for token, or is not written


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
