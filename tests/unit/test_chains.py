"""No prompt has read its own answer, nor anything later: over random histories, positions and settings."""

from dataclasses import replace

from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st
from planted_writers import Planted, StoreInMemory
from stock_forward import SETTINGS, STYLE

from recbole_mllm.data.item_table import Items
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.summaries.chains import State, before, history_digest, state_at, steps
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.user_summaries import SummaryRequests, as_rows, preferences

BASE = SETTINGS.summary

SETTINGS = st.builds(
    lambda size, partial, most, mode: replace(
        BASE, block_size=size, partial_block=partial, max_history=most, summary_mode=mode, item_summary="none"
    ),
    st.integers(1, 5),
    st.booleans(),
    st.none() | st.integers(1, 7),
    st.sampled_from(["recurrent", "direct"]),
)
HISTORIES = st.dictionaries(st.sampled_from(["u1", "u2", "u3"]), st.integers(2, 12), min_size=1)


class Echo(Planted):
    """Writes the markers it has read, so that a summary shows what it knows."""

    def __init__(self):
        super().__init__(lambda prompt: " ".join(sorted(set(_markers(prompt.text)))), 3)


def _markers(text):
    return [word.strip(".,:") for word in text.split() if word.startswith("seen-")]


def _world(lengths):
    histories = {user: [f"{user}i{n}" for n in range(length)] for user, length in lengths.items()}
    titles = {item: f"seen-{item}" for items in histories.values() for item in items}
    return histories, Items(titles, {})


def _run(plan, items, settings):
    generator = CachedGenerator("user", Echo, "echo", StoreInMemory(), Decoding(9))
    return preferences(generator, STYLE, items, {}, plan, settings)


@settings_(deadline=None)
@given(lengths=HISTORIES, settings=SETTINGS)
def test_a_row_reads_only_what_lies_before_it(lengths, settings):
    histories, items = _world(lengths)
    plan = SummaryRequests(histories, {user: set(range(len(h))) for user, h in histories.items()})
    texts = _run(plan, items, settings)
    known = Preferences(texts, plan, items, STYLE, settings)
    for user, history in histories.items():
        for position in range(len(history)):
            chain = known.chain(user, position)
            assert [one for one, _ in chain][-1:] == ([state] if (state := state_at(position, settings)) else [])
            assert (chain[-1][1] if chain else STYLE.cold) == known.of(user, position)
            if settings.summary_mode == "recurrent":
                assert [one.since for one, _ in chain[1:]] == [one.seen for one, _ in chain[:-1]]
            seen = set(_markers(known.of(user, position)))
            start = 0 if settings.max_history is None else max(0, position - settings.max_history)
            stop = position
            if settings.summary_mode == "recurrent" and not settings.partial_block:
                stop = start + (position - start) // settings.block_size * settings.block_size
            assert seen == {f"seen-{item}" for item in history[start:stop]}


@settings_(deadline=None)
@given(lengths=HISTORIES, settings=SETTINGS)
def test_shared_chains_say_what_each_row_alone_would(lengths, settings):
    histories, items = _world(lengths)
    whole = SummaryRequests(histories, {user: set(range(1, len(h))) for user, h in histories.items()})
    together = _run(whole, items, settings)
    for user, history in histories.items():
        alone = SummaryRequests(histories, {user: {len(history) - 1}})
        for key, text in _run(alone, items, settings).items():
            assert together[key] == text


def test_full_blocks_are_shared_and_a_step_continues_the_one_before_it():
    settings = replace(BASE, block_size=2)
    found = steps([state_at(p, settings) for p in (3, 4, 5)], settings)
    assert found == [[State(0, 0, 2)], [State(0, 2, 3), State(0, 2, 4)], [State(0, 4, 5)]]
    assert before(State(0, 2, 3), settings) == State(0, 0, 2) and before(State(0, 0, 2), settings) is None


def test_rows_name_the_history_they_have_read():
    histories, items = _world({"u1": 5})
    plan = SummaryRequests(histories, {"u1": {4}})
    rows = as_rows(_run(plan, items, BASE), plan)
    assert [(row.seen, row.history) for row, _ in rows] == [
        (3, history_digest(histories["u1"][:3])),
        (4, history_digest(histories["u1"][:4])),
    ]
