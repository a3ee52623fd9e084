"""What changed is marked, and nothing is lost: both texts can be read off the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recbole_mllm.benchmark.wordiff import Piece, word_changes

TEXTS = st.lists(
    st.sampled_from(["the", "user", "likes", "red", "green", "lamps", "maps", "and", "old"]), max_size=15
).map(" ".join)


def test_one_word_in_another_is_marked_where_it_stood():
    assert word_changes("likes red lamps and maps", "likes green lamps and maps now") == [
        Piece("same", "likes"), Piece("gone", "red"), Piece("new", "green"), Piece("same", "lamps and maps"),
        Piece("new", "now"),
    ]  # fmt: skip


def test_a_lone_word_between_two_changes_does_not_break_them_up():
    assert word_changes("a b red the lamp c d", "a b green the map c d") == [
        Piece("same", "a b"), Piece("gone", "red the lamp"), Piece("new", "green the map"), Piece("same", "c d"),
    ]  # fmt: skip


@given(TEXTS, TEXTS)
def test_both_texts_can_be_read_off_the_pieces(before, after):
    pieces = word_changes(before, after)
    assert " ".join(piece.text for piece in pieces if piece.change != "gone") == after
    assert " ".join(piece.text for piece in pieces if piece.change != "new") == before
    assert before != after or all(piece.change == "same" for piece in pieces)
