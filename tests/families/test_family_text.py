"""Prompts of every family: item text cannot break out, truncation spares what matters, answers are read in context."""

import pytest
import torch
from stock_forward import STYLE, loss_of, own_inputs, own_logits

from recbole_mllm.common.prompts import recommend_prompt

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
