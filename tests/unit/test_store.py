"""The store: nothing twice, processes that share it, and what happens when disk, file or process fail."""

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import pytest
from planted_writers import Planted

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.mllm.interface import Answer, Decoding
from recbole_mllm.summaries.generator import CachedGenerator, Request
from recbole_mllm.summaries.store import PAGE, VERSION, Leases, ReadOnlyStore, Store, opened_store, owner_of

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
    """Return all answers; what is damaged is repaired by the first look and read by the second."""
    try:
        with closing(Store(path)) as store:
            return store.get([key(n) for n in range(COUNT)])
    except UserError as error:
        assert "has been repaired; run the same command again" in str(error)
    with closing(Store(path)) as store:
        return store.get([key(n) for n in range(COUNT)])


def python(script, *arguments):
    code = textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


# Processes that share it


def _add(path: Path, start: int) -> None:
    store = Store(path)
    for n in range(start, start + 50):
        add(store, [n])


def _get_all(path, queue):
    queue.put(len(everything(path)))


def in_two_processes(work, *arguments):
    """Start `work` twice at once and wait for both."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=each) for each in zip(*arguments, strict=True)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]


def test_two_processes_share_one_file(tmp_path):
    in_two_processes(_add, [tmp_path / "s"] * 2, (0, 25))
    found = everything(tmp_path / "s")
    assert len(found) == 75 and right(found)


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


def pages(path):
    for place in range(10, path.stat().st_size // PAGE, path.stat().st_size // PAGE // 6):
        damage(path, place * PAGE)


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda path: damage(path, middle(path)), COUNT - A_PAGE),
        (pages, COUNT - 8 * A_PAGE),
        (lambda path: os.truncate(path, path.stat().st_size * 2 // 3), COUNT // 3),
        (lambda path: damage(path, path.read_bytes().index(b"answer 1234 "), b"\xff\xfe\xff"), COUNT - 2),  # no text
        (lambda path: damage(path, 0, b"\xaa" * 100), -1),
        (lambda path: path.write_text("this is no database, and long enough to be taken for one " * 400), -1),
    ],
    ids=["a page", "pages", "truncated", "no text", "its header", "no database"],
)
def test_what_can_be_read_of_a_damaged_file_is_saved_and_the_bad_file_stays(path, spoil, least, caplog):
    spoil(path)
    bad = path.read_bytes()
    found = everything(path)
    assert right(found) and least < len(found) < COUNT
    assert path.with_name("s.corrupt-1").read_bytes() == bad
    (line,) = [r.getMessage() for r in caplog.records if "was damaged" in r.getMessage()]
    assert f"{len(found)} answers were saved" in line and "s.corrupt-1" in line


def test_damage_found_while_working_is_repaired_for_everyone(path):
    store, second = Store(path), Store(path)
    damage(path, middle(path))
    with pytest.raises(UserError, match="run the same command again"):
        store.get([key(n) for n in range(COUNT)])
    found = store.get([key(n) for n in range(COUNT)])
    missing = [n for n in range(COUNT) if key(n) not in found]
    assert 0 < len(missing) < A_PAGE
    add(second, missing)
    assert right(everything(path)) and len(everything(path)) == COUNT


def test_two_processes_that_find_the_damage_repair_it_once(path):
    damage(path, middle(path))
    queue = multiprocessing.get_context("spawn").Queue()
    in_two_processes(_get_all, [path] * 2, [queue] * 2)
    assert COUNT - A_PAGE < queue.get(timeout=60) == queue.get(timeout=60) < COUNT
    assert len(list(path.parent.glob("s.corrupt-?"))) == 1


def test_what_only_the_log_holds_is_saved_too(tmp_path):
    store, rest = Store(filled(tmp_path / "s", COUNT - 5)), range(COUNT - 5, COUNT)
    add(store, rest)
    for suffix in ("", "-wal"):  # as a killed process leaves them
        (tmp_path / f"t{suffix}").write_bytes((tmp_path / f"s{suffix}").read_bytes())
    damage(tmp_path / "t", 10 * PAGE)
    found = everything(tmp_path / "t")
    assert right(found) and COUNT - A_PAGE < len(found) < COUNT and {key(n) for n in rest} <= found.keys()


# Other versions, other files, other trouble


def test_a_newer_store_is_refused(tmp_path):
    folder = tmp_path / "d"
    path = folder / "d.mllm.sqlite"
    with closing(Store(path)) as store, store.transaction(write=True) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    for opened in (lambda: Store(path), lambda: ReadOnlyStore(folder)):
        with pytest.raises(UserError, match="written by a newer version"):
            opened()


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE songs (a, b)", "CREATE TABLE answers (id INTEGER)", "CREATE VIEW answers AS SELECT 1"]
)
def test_a_database_of_something_else_is_left_as_it_is(statement, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / "d.mllm.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
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
    with pytest.raises(UserError, match=r"s is no file; move it away, and a new store is created"):
        Store(tmp_path / "s")
    with pytest.raises(UserError, match=r"t is no file; move it away"):
        Store(tmp_path / "t")
    with pytest.raises(UserError, match=r"store .*s cannot be opened .*check the folder"):
        Store(tmp_path / "file" / "s")
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "d.mllm.sqlite").write_bytes(b"")
    assert ReadOnlyStore(folder).get(["k"]) == {} and (folder / "d.mllm.sqlite").stat().st_size == 0
    assert len(Store(folder / "d.mllm.sqlite")) == 0


ADDING = """
    import os, resource, sys
    from pathlib import Path
    from recbole_mllm.common.errors import UserError
    from recbole_mllm.mllm.interface import Answer
    from recbole_mllm.summaries.store import Store
    try:
        {prepare}
        store = Store(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for n in range(10_000):
            store.add("user", "m", [f"k{{n}}"], [Answer("x" * 1000, 1, 1)], 0.0)
            print(n, flush=True)
    except UserError as error:
        print(error)
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    *numbers, line = python(ADDING.format(prepare=""), tmp_path / "s").stdout.splitlines()
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
            done = python(ADDING.format(prepare="os.geteuid() or os.setuid(65534)  # root may write anywhere"), path)
        finally:
            path.parent.chmod(0o755)
        assert "make its folder writable" in done.stdout and str(path) in done.stdout and not done.stderr
        assert path.read_bytes() == before
