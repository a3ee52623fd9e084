"""Prompts to token ids: special tokens in item text stay plain text, and what is too long says what helps."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from planned_server import Planned as PlannedServer
from planned_server import error, serving
from planted_writers import Planted, StoreInMemory, answers_of
from stock_forward import CPU, SETTINGS, STYLE
from tiny_models.words import byte_level, gemma_sentencepiece, llama_sentencepiece
from tokenizers import AddedToken, normalizers
from transformers import MllamaConfig, MllamaForConditionalGeneration

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import Endpoint
from recbole_mllm.common.prompts import Prompt, recommend_prompt, titles_as_preference
from recbole_mllm.common.settings import ServerSettings
from recbole_mllm.data.item_table import Items
from recbole_mllm.mllm.encoder import ROOM, PlainText, shorter
from recbole_mllm.mllm.families import architecture_of
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Batch, Decoding
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.mllm.server_messages import messages
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences

SPECIAL = ["<a>", "<<a>", "a><", "<s>", "<|x|>", "x|><s"]
WORDS = {
    "bytes": byte_level(SPECIAL, None, bos_token="<s>"),
    "llama": llama_sentencepiece(None),
    "llama-legacy": llama_sentencepiece(None, legacy=True),
    "gemma": gemma_sentencepiece(None),
}
for _kind in ("llama", "llama-legacy", "gemma"):
    WORDS[_kind].add_special_tokens({"additional_special_tokens": SPECIAL})


@pytest.mark.parametrize("kind", WORDS)
@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIAL, "<", "a", ">", " ", "|", "mug", "\n", "é"]), max_size=8))
def test_no_text_makes_a_special_token_and_every_text_comes_back(kind, parts):
    words, text = WORDS[kind], "".join(parts)
    plain = PlainText(words)
    ids = plain.ids("The title is " + plain.guard(text))
    assert not {words.convert_tokens_to_ids(w) for w in [*SPECIAL, *words.all_special_tokens] if w.strip()} & set(ids)
    assert words.decode(ids) == "The title is " + text


@pytest.mark.parametrize("kind", WORDS)
@given(text=st.text("<a>| mug\né", max_size=12))
@settings(max_examples=20, deadline=None)
def test_text_that_spells_nothing_is_tokenised_in_one_piece(kind, text):
    words = WORDS[kind]
    if not any(word in text for word in [*SPECIAL, *words.all_special_tokens]):
        plain = PlainText(words)
        assert plain.ids(plain.guard(text)) == words(text, add_special_tokens=False)["input_ids"]


def test_letters_a_tokeniser_folds_into_a_special_token_are_noticed_and_taken_apart(caplog):
    words = byte_level(["<s>"], None, bos_token="<s>")
    words.backend_tokenizer.normalizer = normalizers.NFKC()
    words.add_tokens([AddedToken("<pic>", normalized=True, special=False)])
    plain, wide = PlainText(words), "\uff1cpic\uff1e"
    assert words("<pic>")["input_ids"] == words(wide)["input_ids"]  # full-width letters break out
    for _ in range(2):
        assert plain.broken(plain.ids(plain.guard(wide)), plain.guard(wide))
    assert caplog.text.count("letter by letter") == 1  # said once
    apart = plain.ids(plain.guard(wide, every=True))
    assert words.convert_tokens_to_ids("<pic>") not in apart and not plain.broken(apart, wide)
    assert words.decode(apart) == "<pic>"


HARMLESS = ["\u00fc", "\u00f6", "mug", "f\u00fcr", "\u2581\u2581", "\n\n", "   "]  # what vocabularies are extended by
TAGS = ["<think>", "<|tool|>", "[REF]"]  # of which some are not special, and structure a chat all the same
TITLES = [
    "F\u00fcr Elise",
    "a mug  f\u00fcr\n\n\u00d6l",
    "sch\u00f6n   mugs und \u2581\u2581",
    "\u00fc",
    " mug ",
    "\u00fc<think>\u00fc[REF]mug",
]


def extended(kind, **how):
    """Return a tokeniser with words and tags added, none of them special."""
    make = {"bytes": lambda: byte_level(["<s>"], None, bos_token="<s>"), "llama": lambda: llama_sentencepiece(None)}
    words = (make | {"gemma": lambda: gemma_sentencepiece(None)})[kind]()
    words.add_tokens([AddedToken(word, special=False, **how) for word in [*HARMLESS, *TAGS]])
    return words


@pytest.mark.parametrize("kind", ["bytes", "llama", "gemma"])
@pytest.mark.parametrize("how", [{"normalized": True}, {"normalized": False, "lstrip": True, "rstrip": True}])
def test_added_words_and_letters_are_read_as_the_tokeniser_reads_them_and_tags_are_not(kind, how, caplog):
    words = extended(kind, **how)
    plain = PlainText(words)
    assert set(TAGS) < set(plain.spellings) and not set(HARMLESS) & set(plain.spellings)
    tags, seen = set(words.convert_tokens_to_ids(TAGS)), set()
    for title in TITLES:
        text = f"The title is {plain.guard(title)}. Yes"
        ids, stock = plain.ids(text), words(f"The title is {title}. Yes", add_special_tokens=False)["input_ids"]
        assert not tags & set(ids) and not plain.broken(ids, text)
        seen |= set(ids)
        if not any(tag in title for tag in TAGS):
            assert ids == stock
    assert {words.convert_tokens_to_ids(w) for w in ("\u00fc", "\u00f6", "mug")} <= seen  # else nothing was shown
    assert not caplog.text


FILMS = [f"f{n}" for n in range(60)]
FILM_ITEMS = Items({film: f"A film of some name, part {film} (1994)" for film in FILMS}, {})
SHOWN = dict.fromkeys(FILMS, "A drama in a small town, with a dog.")


def asked(**changes):
    """Return the first prompt about a user who has seen all films, as the summaries' stage asks it."""
    prompts, requests = [], SummaryRequests({"u": FILMS}, {"u": {len(FILMS)}})
    writer = Planted(lambda prompt: prompts.append(prompt) or "likes dogs")
    generator = CachedGenerator("user", lambda: writer, "m", StoreInMemory(), Decoding(9))
    preferences(generator, STYLE, FILM_ITEMS, SHOWN, requests, replace(SETTINGS.summary, **changes))
    return prompts[0]


@pytest.fixture(scope="module")
def bundled():
    return HFModel("tiny", replace(SETTINGS.mllm, max_text_tokens=448), CPU)


@pytest.mark.parametrize(
    ("mode", "shorter"),
    [
        ({"summary_mode": "direct"}, {"max_history": 6}),
        ({"summary_mode": "recurrent", "block_size": 60}, {"block_size": 6}),
        ({"summary_mode": "recurrent", "block_size": 60}, {"max_history": 6}),
    ],
)
def test_a_history_too_long_for_the_model_is_told_the_setting_that_shortens_it(bundled, mode, shorter):
    with pytest.raises(UserError, match=f"a history .*first letters of its 120 texts.*smaller.*{next(iter(shorter))}"):
        bundled.encoder(asked(**mode))
    assert len(bundled.encoder(asked(**mode | shorter)).ids) <= bundled.encoder.max_text_tokens


def test_a_server_that_finds_a_history_too_long_is_told_of_both_ways_out():
    settings = ServerSettings(4, 5.0, 2.0, None)
    too_long = PlannedServer(lambda n, text: error(400, "maximum context length is 9 tokens"))
    with serving(too_long) as planned, pytest.raises(UserError, match="6 texts.*max_history.*longer context"):
        ServerModel(Endpoint("m", (planned.url,)), settings).write(
            Batch([asked(summary_mode="direct", max_history=3)], Decoding(9))
        )


@pytest.fixture
def narrow(bundled, monkeypatch):
    """The bundled model, of 512 positions, with all the text tokens one could ask for."""
    monkeypatch.setattr(bundled.encoder, "max_text_tokens", 10**6)
    assert bundled.encoder.positions == bundled.model.config.get_text_config().max_position_embeddings == 512
    return bundled


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def test_image_tokens_and_the_answer_count_against_the_models_positions(narrow, picture):
    image = narrow.encoder.image(picture)
    long = recommend_prompt(STYLE, "word " * 600, "a mug", picture)
    asked_now = narrow.encode([long])[0]
    assert len(asked_now.ids) <= 512 - ROOM and asked_now.ids.count(image.ids[0]) == len(image.ids)
    assert len(asked_now.ids) > 512 - ROOM - 8  # and all that there is is used
    example = narrow.examples([long], torch.ones(1), narrow.answers(STYLE))[0]
    assert len(example.ids) <= 512
    written = answers_of(narrow, [long], Decoding(200))[0]
    assert written.shortened and written.prompt_tokens + 200 <= 512


@pytest.mark.parametrize(("room", "images", "what"), [(500, 0, "fixed"), (48, 40, "fixed"), (48, 0, "history")])
def test_where_positions_are_too_few_the_error_says_what_helps(narrow, picture, room, images, what):
    prompt = Prompt("Describe this as well as you can. " * 3 + "<image>" * images, (picture,) * images)
    prompt = asked(summary_mode="direct") if what == "history" else prompt
    with pytest.raises(UserError, match=rf"{what} .*512 positions; .*lower .*smaller images, or take") as caught:
        narrow.encoder(prompt, room=room)
    assert "max_text_tokens" not in str(caught.value) and ("max_history" in str(caught.value)) == (what == "history")


def test_a_fixed_wording_over_max_text_tokens_says_so(bundled, monkeypatch):
    monkeypatch.setattr(bundled.encoder, "max_text_tokens", 9)
    with pytest.raises(UserError, match="fixed wording, .*over max_text_tokens = 9 tokens; raise max_text_tokens"):
        bundled.encoder(recommend_prompt(STYLE, "likes cats", "a mug", None))


def test_a_text_of_megabytes_is_cut_before_it_is_tokenised(bundled, monkeypatch):
    tokenised, encoder = [], bundled.encoder
    stock, before = encoder._plain._encode, encoder.truncated
    monkeypatch.setattr(encoder._plain, "_encode", lambda text: tokenised.append(len(text)) or stock(text))
    long, again = (encoder(recommend_prompt(STYLE, "a preference", "x" * n, None)) for n in (2_000_000, 40_000))
    assert encoder.truncated == before + 2 and len(long.ids) == len(again.ids)
    assert len(encoder.text_ids("y" * 2_000_000)) == encoder.max_text_tokens
    assert max(tokenised) < 100 * encoder.max_text_tokens


def test_answers_that_begin_alike_are_refused(bundled):
    with pytest.raises(UserError, match="begin with the same token"):
        bundled.answers(replace(STYLE, answer_no="Yes but no"))


def test_an_image_that_a_processor_refuses_is_named(tmp_path):
    Image.new("RGB", (900, 2)).save(tmp_path / "line.png")
    model = HFModel(str(tiny_models.qwen2_vl(tmp_path / "model")), SETTINGS.mllm, CPU)
    with pytest.raises(UserError, match=r"line.png: the model's image processor refuses it \(absolute aspect ratio"):
        model.encoder(recommend_prompt(STYLE, "likes cats", "a mug", tmp_path / "line.png"))


def test_of_titles_that_stand_for_a_preference_the_newest_stay(bundled):
    titles = [f"title number {n}" for n in range(60)]
    prompt = recommend_prompt(STYLE, titles_as_preference(STYLE, titles), "a mug", None)
    encoder = replace(bundled.encoder, max_text_tokens=120)
    read = encoder.tokenizer.decode(encoder(prompt).ids)
    kept = [title for title in titles if f"{title}\n" in f"{read}\n"]
    assert 3 < len(kept) < 30 and kept == titles[-len(kept) :]
    assert STYLE.titles.partition("{")[0].strip() in read and "a mug" in read
    assert "title number 59" in str(messages(prompt, shortened=3)) and "number 20" not in str(messages(prompt, 3))


@given(st.text(alphabet="ab\n", max_size=40), st.integers(1, 30))
def test_a_shortened_text_is_as_long_as_it_may_be_at_most_and_whole_where_it_may_be(text, length):
    found = shorter(text, length)
    assert len(found) <= length and (found == text or len(text) > length)


def test_a_text_model_says_that_it_reads_no_images(tmp_path, picture):
    text = HFModel(str(tiny_models.llama(tmp_path)), SETTINGS.mllm, CPU)
    with pytest.raises(UserError, match="reads no images; set use_image: false"):
        text.encoder(recommend_prompt(STYLE, "likes cats", "a mug", picture))


def test_a_model_that_attends_to_images_in_layers_of_their_own_is_said_to_read_none(tmp_path, picture):
    vision = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0], "hidden_size": 32}
    text = {
        "num_hidden_layers": 2,
        "cross_attention_layers": [1],
        "hidden_size": 32,
        "vocab_size": 99,
        "pad_token_id": 0,
    }
    with torch.device("meta"):
        llama = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    model = HFModel(str(tiny_models.llava(tmp_path)), SETTINGS.mllm, CPU)
    model.encoder.architecture = architecture_of(llama)
    with pytest.raises(UserError, match=r"layers of their own \(Llama-3.2-Vision\) read none here"):
        model.encoder(recommend_prompt(STYLE, "likes cats", "a mug", picture))
