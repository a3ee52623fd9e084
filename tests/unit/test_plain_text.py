"""Special tokens in item text, against tokenisers made to be hard."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models.words import byte_level, gemma_sentencepiece, llama_sentencepiece
from tokenizers import AddedToken, normalizers

from recbole_mllm.mllm.plaintext import CUT, PlainText

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
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIAL, "<", "a", ">", " ", "|", "mug", "\n", "é"]), max_size=8))
def test_no_text_makes_a_special_token_and_every_text_comes_back(kind, parts):
    words, text = WORDS[kind], "".join(parts)
    plain = PlainText(words)
    ids = plain.ids("The title is " + plain.guard(text))
    assert not {words.convert_tokens_to_ids(w) for w in [*SPECIAL, *words.all_special_tokens] if w.strip()} & set(ids)
    assert words.decode(ids) == "The title is " + text


@pytest.mark.parametrize("kind", WORDS)
@given(text=st.text("<a>| mug\né", max_size=12))
@settings(max_examples=40, deadline=None)
def test_text_that_spells_nothing_is_tokenised_in_one_piece(kind, text):
    words = WORDS[kind]
    if not any(word in text for word in [*SPECIAL, *words.all_special_tokens]):
        plain = PlainText(words)
        assert plain.ids(plain.guard(text)) == words(text, add_special_tokens=False)["input_ids"]


def test_letters_a_tokeniser_folds_into_a_special_token_are_noticed_and_taken_apart():
    words = byte_level(["<s>"], None, bos_token="<s>")
    words.backend_tokenizer.normalizer = normalizers.NFKC()
    words.add_tokens([AddedToken("<pic>", normalized=True, special=False)])
    plain, wide = PlainText(words), "\uff1cpic\uff1e"
    assert words("<pic>")["input_ids"] == words(wide)["input_ids"]  # full-width letters break out
    assert plain.broken(plain.ids(plain.guard(wide)), plain.guard(wide))
    apart = plain.ids(plain.guard(wide, every=True))
    assert words.convert_tokens_to_ids("<pic>") not in apart and not plain.broken(apart, wide)
    assert words.decode(apart) == "<pic>"


def test_a_guard_cuts_only_what_spells_a_token():
    plain = PlainText(WORDS["bytes"])
    assert plain.guard("a mug < 5 > 3") == "a mug < 5 > 3"
    assert plain.guard("<|x|>") == f"<{CUT}|x|>"


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
@pytest.mark.parametrize("how", [{"normalized": False}, {"normalized": True}, {"lstrip": True}, {"rstrip": True}])
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


def test_a_special_letter_is_no_special_token_in_a_title_and_one_in_the_template():
    words = byte_level(["<s>", "\u2603", "ab"], None, bos_token="<s>")
    plain, letter = PlainText(words), words.convert_tokens_to_ids("\u2603")
    text = "\u2603 the title: " + plain.guard("\u2603 5 of the law, \u2603\u2603 6") + "\u2603"
    ids = plain.ids(text)
    assert ids.count(letter) == 2 and not plain.broken(ids, text)
    assert words.decode(ids) == "\u2603 the title: \u2603 5 of the law, \u2603\u2603 6\u2603"


def test_letters_taken_apart_are_told_of_once(caplog):
    words = byte_level(["<s>"], None, bos_token="<s>")
    words.backend_tokenizer.normalizer = normalizers.NFKC()
    words.add_tokens([AddedToken("<pic>", normalized=True, special=False)])
    plain, wide = PlainText(words), "\uff1cpic\uff1e"
    for _ in range(2):
        assert plain.broken(plain.ids(plain.guard(wide)), plain.guard(wide))
    assert caplog.text.count("letter by letter") == 1
