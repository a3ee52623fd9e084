"""The store: nothing twice, processes that share it, and what happens when disk, file or process fail."""

import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from planted_writers import Planted

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.mllm.interface import Answer, Decoding
from recbole_mllm.summaries.generator import CachedGenerator, Request
from recbole_mllm.summaries.store import (
    PAGE,
    VERSION,
    Leases,
    ReadOnlyStore,
    Row,
    Store,
    answer_key,
    log_ahead,
    owner_of,
)
from recbole_mllm.summaries.work_shares import opened_store

A_PAGE = 130  # answers one page holds, at most
COUNT = 3000


def key(n):
    return f"{n * 0x9E3779B97F4A7C15 % 2**256:064x}"[::-1]


def text(n):
    return f"answer {n} " + "long " * (n % 40)


def add(store, numbers):
    store.add("user", "m", [key(n) for n in numbers], [Answer(text(n), n, 1) for n in numbers], 0.0)


def filled(path, count=COUNT):
    with closing(Store(path)) as store:
        add(store, range(count))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("whole") / "s").read_bytes()


@pytest.fixture
def path(tmp_path, whole):
    """A store of `COUNT` answers."""
    (tmp_path / "s").write_bytes(whole)
    return tmp_path / "s"


def right(found):
    return all(found[k] == text(n) for n in range(COUNT) if (k := key(n)) in found)


def damage(path, offset, data=b"\xaa" * PAGE):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def middle(path):
    return path.stat().st_size // PAGE // 2 * PAGE


def everything(path):
    with closing(Store(path)) as store:
        return store.get([key(n) for n in range(COUNT)])


def python(script, *arguments):
    code = textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


# Keys and batches


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
    with pytest.raises(sqlite3.IntegrityError):
        store.add("user", "m", ["a", "b"], [Answer("fine", 1, 1), Answer(None, 1, 1)], 0.0)
    assert len(store) == 0


# Processes that share it


def _add(path: Path, start: int) -> None:
    store = Store(path)
    for n in range(start, start + 50):
        add(store, [n])


def test_two_processes_share_one_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(tmp_path / "s", start)) for start in (0, 25)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    found = everything(tmp_path / "s")
    assert len(found) == 75 and right(found)


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


CLAIMS = """
    import sys
    from pathlib import Path
    from recbole_mllm.summaries.store import Leases, Store
    print(*sorted(Leases(Store(Path(sys.argv[1]))).claim(["a", "b"]).mine), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process, which has claimed a and b in the store of `tmp_path`."""
    words = [sys.executable, "-c", textwrap.dedent(CLAIMS), str(tmp_path / "s")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "a b\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_living_process_claimed_is_left_and_a_dead_ones_is_taken(tmp_path, other):
    store = Store(tmp_path / "s")
    mine = Leases(store)
    store.add("user", "m", ["d"], [Answer("known", 1, 1)], 1.0)
    assert mine.claim(["a", "b", "c", "d"]) == ({"c"}, {"d": "known"})
    other.kill()  # and not waited for: a zombie is as dead
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert mine.claim(["a", "b"]).mine == {"a", "b"}


def test_a_lease_ends_with_time_and_when_it_is_given_back(tmp_path, other, monkeypatch):
    store = Store(tmp_path / "s")
    mine = Leases(store)
    assert mine.claim(["a"]).mine == set()
    monkeypatch.setattr("recbole_mllm.summaries.store.time.time", lambda: 4e9)
    assert mine.claim(["a"]).mine == {"a"}
    mine.release(["a"])
    with store.transaction() as db:
        assert db.execute("SELECT key FROM leases").fetchall() == [("b",)]


class InTurn:
    """Has one request after the other."""

    def __init__(self, *texts):
        self.left, self.texts, self.free = list(texts), {}, True

    def ready(self, count):
        if not self.left or not self.free:
            return []
        self.free = False
        return [Request(self.left[0], Prompt(self.left.pop(0)))]

    def receive(self, name, text):
        self.texts[name], self.free = text, True


def test_two_who_wait_for_each_others_last_answer_both_get_it(tmp_path):
    """Each has answered what the other asks next, and nothing more comes that would have it committed."""
    both_claimed, sources = threading.Barrier(2, timeout=20), (InTurn("a", "b"), InTurn("b", "a"))

    def write(source, owner):
        def reply(prompt):
            both_claimed.wait()
            return f"{prompt.text}, says {owner}"

        store = Store(tmp_path / "s")
        leases = Leases(store)
        if owner == "two":  # as another process that lives
            leases._owner = owner_of(os.getppid())
        CachedGenerator("user", lambda: Planted(reply), "m", store, Decoding(9), leases=leases).generate(source)

    threads = [threading.Thread(target=write, args=a, daemon=True) for a in zip(sources, ("one", "two"), strict=True)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert [source.texts for source in sources] == [{"a": "a, says one", "b": "b, says two"}] * 2


# Damage


def test_a_bad_page_costs_its_own_answers_and_the_bad_file_is_kept(path, caplog):
    damage(path, middle(path))
    bad = path.read_bytes()
    found = everything(path)
    assert right(found) and COUNT - A_PAGE < len(found) < COUNT
    assert path.with_name("s.corrupt-1").read_bytes() == bad
    (line,) = [r.getMessage() for r in caplog.records if "was damaged" in r.getMessage()]
    assert f"{len(found)} answers were saved" in line and "s.corrupt-1" in line


def pages(path):
    for place in range(10, path.stat().st_size // PAGE, path.stat().st_size // PAGE // 6):
        damage(path, place * PAGE)


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (pages, COUNT - 8 * A_PAGE),
        (lambda path: os.truncate(path, path.stat().st_size * 2 // 3), COUNT // 3),
        (lambda path: damage(path, path.read_bytes().index(b"answer 1234 "), b"\xff\xfe\xff"), COUNT - 2),  # no text
    ],
    ids=["pages", "truncated", "no text"],
)
def test_what_can_be_read_of_a_damaged_file_is_saved(path, spoil, least):
    spoil(path)
    found = everything(path)
    assert right(found) and least < len(found) < COUNT


@pytest.mark.parametrize("what", ["its header", "no database"])
def test_a_file_of_which_nothing_can_be_read_is_set_aside_as_it_is(path, what, caplog):
    if what == "no database":
        path.write_text("this is not a database, and long enough to be taken for one " * 400)
    else:
        damage(path, 0, b"\xaa" * 100)
    bad = path.read_bytes()
    assert everything(path) == {} and "0 answers were saved" in caplog.text
    assert path.with_name("s.corrupt-1").read_bytes() == bad


def test_damage_found_while_working_is_repaired_for_everyone_and_the_work_goes_on(path):
    store, second = Store(path), Store(path)
    damage(path, middle(path))
    found = store.get([key(n) for n in range(COUNT)])
    missing = [n for n in range(COUNT) if key(n) not in found]
    assert 0 < len(missing) < A_PAGE
    add(second, missing)
    assert right(everything(path)) and len(everything(path)) == COUNT


def _get_all(path, queue):
    queue.put(len(everything(path)))


def test_two_processes_that_find_the_damage_repair_it_once(path):
    damage(path, middle(path))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_get_all, args=(path, queue)) for _ in range(2)]
    [worker.start() for worker in workers]
    first, second = (queue.get(timeout=60) for _ in workers)
    [worker.join(60) for worker in workers]
    assert COUNT - A_PAGE < first == second < COUNT
    assert len(list(path.parent.glob("s.corrupt-?"))) == 1


def test_what_only_the_log_holds_is_saved_too(tmp_path):
    store, rest = Store(filled(tmp_path / "s", COUNT - 5)), range(COUNT - 5, COUNT)
    add(store, rest)
    for suffix in ("", "-wal"):  # as a killed process leaves them
        (tmp_path / f"t{suffix}").write_bytes((tmp_path / f"s{suffix}").read_bytes())
    damage(tmp_path / "t", 10 * PAGE)
    found = everything(tmp_path / "t")
    assert right(found) and COUNT - A_PAGE < len(found) < COUNT and {key(n) for n in rest} <= found.keys()


def test_random_damage_never_ends_in_anything_but_right_answers_or_a_clear_line(tmp_path, whole):
    draw = random.Random(3)
    for n in range(8):
        path = tmp_path / f"s{n}"
        path.write_bytes(whole)
        for _ in range(3):
            damage(path, draw.randrange(PAGE, len(whole) - 64), draw.randbytes(draw.choice((1, 8, 64))))
        try:
            found = everything(path)
        except UserError:
            continue
        assert len(found) > COUNT // 2
        assert sum(found[k] != text(i) for i in range(COUNT) if (k := key(i)) in found) <= 3  # bytes within a text


# Other versions, other files, other trouble


def test_an_older_store_is_brought_up_and_a_newer_one_refused(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / "d.mllm.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,"
            " prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, seconds REAL NOT NULL,"
            " created REAL NOT NULL) WITHOUT ROWID"
        )
        db.execute("INSERT INTO answers VALUES ('a', 'old', 'user', 'm', 1, 1, 1.0, 1.0)")
    store = Store(path)
    store.add("user", "m", ["b"], [Answer("new", 1, 1, True)], 0.0)
    assert store.get(["a", "b"]) == {"a": "old", "b": "new"}
    with store.transaction(write=True) as db:
        assert db.execute("SELECT origin, truncated FROM answers ORDER BY key").fetchall() == [("", 0), ("", 1)]
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    store.close()
    for opened in (lambda: Store(path), lambda: ReadOnlyStore(folder)):
        with pytest.raises(UserError, match="written by a newer version"):
            opened()


FOREIGN = {
    "another's tables": ["CREATE TABLE songs (a, b)", "INSERT INTO songs VALUES (1, 2)"],
    "answers of another shape": ["CREATE TABLE answers (id INTEGER, body TEXT)", "INSERT INTO answers VALUES (1, 'x')"],
    "answers of no type": [f"CREATE TABLE answers ({', '.join(Row._fields)})", "PRAGMA user_version = 1"],
    "a view": ["CREATE TABLE t (a)", "CREATE VIEW answers AS SELECT a FROM t"],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_database_of_something_else_is_left_as_it_is(what, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / "d.mllm.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        for statement in FOREIGN[what]:
            db.execute(statement)
    before = path.read_bytes()
    for opened in (lambda: Store(path), lambda: opened_store(folder), lambda: ReadOnlyStore(folder)):
        with pytest.raises(UserError, match=r"is an SQLite file of something else \(.*\); move it away") as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and [p.name for p in folder.iterdir()] == [path.name]


def test_what_is_no_file_in_its_place_is_one_line_and_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "t").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"s is no file; move it away, and a new store is made"):
        Store(tmp_path / "s")
    with pytest.raises(UserError, match=r"t is a link that leads nowhere; move it away"):
        Store(tmp_path / "t")
    with pytest.raises(UserError, match=r"store .*s cannot be opened .*check the folder"):
        Store(tmp_path / "file" / "s")
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "d.mllm.sqlite").write_bytes(b"")
    assert ReadOnlyStore(folder).get(["k"]) == {} and (folder / "d.mllm.sqlite").stat().st_size == 0
    assert len(Store(folder / "d.mllm.sqlite")) == 0


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    done = python(
        """
        import resource, sys
        from pathlib import Path
        from recbole_mllm.common.errors import UserError
        from recbole_mllm.mllm.interface import Answer
        from recbole_mllm.summaries.store import Store
        store = Store(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            for n in range(10_000):
                store.add("user", "m", [f"k{n}"], [Answer("x" * 1000, 1, 1)], 0.0)
                print(n, flush=True)
        except UserError as error:
            print(error)
        """,
        tmp_path / "s",
    )
    *numbers, line = done.stdout.splitlines()
    assert "cannot be written" in line and "make room on the disk" in line and str(tmp_path / "s") in line
    store = Store(tmp_path / "s")
    assert len(numbers) > 10 and len(store) == len(store.get([f"k{n}" for n in numbers])) == len(numbers)


def test_a_read_only_folder_is_one_line_and_the_store_stays_as_it_was():
    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder) / "s", 10)
        before = path.read_bytes()
        path.chmod(0o444)
        path.parent.chmod(0o555)
        try:
            done = python(
                """
                import os, sys
                from pathlib import Path
                from recbole_mllm.common.errors import UserError
                from recbole_mllm.mllm.interface import Answer
                from recbole_mllm.summaries.store import Store
                if os.geteuid() == 0:
                    os.setuid(65534)  # root may write anywhere
                try:
                    Store(Path(sys.argv[1])).add("user", "m", ["new"], [Answer("a", 1, 1)], 0.0)
                except UserError as error:
                    print(error)
                """,
                path,
            )
        finally:
            path.parent.chmod(0o755)
        assert "make its folder writable" in done.stdout and str(path) in done.stdout and not done.stderr
        assert path.read_bytes() == before
