"""The store: nothing twice, two processes at once, and a key for everything that changes an answer."""

import multiprocessing
import sqlite3
import threading
from pathlib import Path

import pytest
from PIL import Image
from planted_writers import Planted

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer, Decoding
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.generator import Scribe
from recbole_mllm.summaries.store import Store, answer_key, log_ahead


def _add(path: Path, start: int) -> None:
    store = Store(path)
    for n in range(start, start + 50):
        store.add("user", "m", [f"k{n}"], [Answer(f"t{n}", 1, 1)], 0.0)


def test_two_processes_share_one_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(tmp_path / "s.sqlite", start)) for start in (0, 25)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    store = Store(tmp_path / "s.sqlite")
    assert len(store) == 75 and store.get(["k0", "k74", "absent"]) == {"k0": "t0", "k74": "t74"}


def test_a_file_that_another_is_about_to_make_is_waited_for_as_long_as_patience_lasts(tmp_path):
    """SQLite says at once that it is locked, as it does where two processes make the file at the same moment."""
    other = sqlite3.connect(tmp_path / "s", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    mine = sqlite3.connect(tmp_path / "s", timeout=0, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        log_ahead(mine, 0.1)
    threading.Timer(0.2, other.execute, ["COMMIT"]).start()
    log_ahead(mine, 60)
    assert mine.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    mine.close()
    other.close()


def test_the_key_changes_with_model_prompt_image_and_length(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2), "red").save(path)
    prompt = Prompt("<image> what?", (path,))
    keys = {answer_key("m", prompt, Decoding(5)), answer_key("n", prompt, Decoding(5))}
    keys |= {answer_key("m", prompt, Decoding(6)), answer_key("m", Prompt("<image> who?", (path,)), Decoding(5))}
    Image.new("RGB", (3, 3), "blue").save(path)
    assert len(keys | {answer_key("m", prompt, Decoding(5))}) == 5


def test_a_batch_is_whole_or_absent(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    bad = [Answer("fine", 1, 1), Answer(None, 1, 1)]
    with pytest.raises(sqlite3.IntegrityError):
        store.add("user", "m", ["a", "b"], bad, 0.0)
    assert len(store) == 0


class Upper(Planted):
    identity = "upper"

    def __init__(self):
        super().__init__(lambda prompt: prompt.text.upper() + "\n\tx", 2)


def test_equal_prompts_are_answered_once_and_answers_are_one_line(tmp_path):
    writer = Upper()
    scribe = Scribe("user", lambda: writer, "upper", Store(tmp_path / "s"), Decoding(3))
    assert scribe.answer([Prompt("a"), Prompt("b"), Prompt("a")]) == ["A x", "B x", "A x"]
    assert sorted(sum(writer.batches, [])) == ["a", "b"]


def test_off_never_writes_and_names_the_command(tmp_path):
    scribe = Scribe("user", Upper, "upper", Store(tmp_path / "s"), Decoding(3), may_write=False)
    with pytest.raises(UserError, match="1 user summaries are missing or stale.*summarize"):
        scribe.answer([Prompt("a")])


def test_a_crash_loses_only_the_batch_in_flight(tmp_path):
    class Dies(Upper):
        def __init__(self):
            super().__init__()
            said, self.reply = self.reply, lambda prompt: said(prompt) if len(self.batches) < 3 else 1 / 0

    prompts = [Prompt(f"p{n}") for n in range(6)]
    writer, second = Dies(), Upper()
    with pytest.raises(ZeroDivisionError):
        Scribe("user", lambda: writer, "upper", Store(tmp_path / "s"), Decoding(3)).answer(prompts)
    Scribe("user", lambda: second, "upper", Store(tmp_path / "s"), Decoding(3)).answer(prompts)
    assert writer.asked == 6 and second.asked == 2  # it died over the last two
