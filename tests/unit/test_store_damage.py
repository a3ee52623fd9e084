"""The store when disk, file or process fail: what was committed is there afterwards, or a line says what to do."""

import logging
import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from recbole_mllm.errors import UserError
from recbole_mllm.mllm.base import Answer
from recbole_mllm.summaries.store import PAGE, VERSION, KnownTexts, Row, Store
from recbole_mllm.summaries.work_shares import opened_store

A_PAGE = 130  # answers one page holds, at most
COUNT = 3000


def key(n):
    return f"{n * 0x9E3779B97F4A7C15 % 2**256:064x}"[::-1]


def text(n):
    return f"answer {n} " + "long " * (n % 40)


def filled(path, count=COUNT):
    store = Store(path)
    store.add("user", "m", [key(n) for n in range(count)], [Answer(text(n), n, 1) for n in range(count)], 0.0)
    store.close()
    return path


def right(found):
    return all(found[k] == text(n) for n in range(COUNT) if (k := key(n)) in found)


def damage(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def everything(path):
    store = Store(path)
    try:
        return store.get([key(n) for n in range(COUNT)])
    finally:
        store.close()


@pytest.mark.parametrize("data", [b"\0", b"\xff", b"\xaa"])
def test_a_bad_page_in_the_middle_costs_its_own_answers_and_the_bad_file_is_kept(tmp_path, data, caplog):
    path = filled(tmp_path / "d.mllm.sqlite")
    pages = path.stat().st_size // PAGE
    damage(path, pages // 2 * PAGE, data * PAGE)
    bad = path.read_bytes()
    found = everything(path)
    assert right(found) and COUNT - A_PAGE < len(found) < COUNT
    assert (tmp_path / "d.mllm.sqlite.corrupt-1").read_bytes() == bad
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{len(found)} answers were saved" in line and "d.mllm.sqlite.corrupt-1" in line


def test_several_bad_pages_cost_their_own_answers(tmp_path):
    path = filled(tmp_path / "s")
    pages = path.stat().st_size // PAGE
    for place in range(10, pages, pages // 6):
        damage(path, place * PAGE, b"\xaa" * PAGE)
    found = everything(path)
    assert right(found) and COUNT - 8 * A_PAGE < len(found) < COUNT


def test_a_store_whose_header_is_damaged_is_set_aside_as_it_is(tmp_path, caplog):
    path = filled(tmp_path / "s", 30)
    damage(path, 0, b"\xaa" * 100)
    bad = path.read_bytes()
    assert everything(path) == {} and "0 answers were saved" in caplog.text
    assert (tmp_path / "s.corrupt-1").read_bytes() == bad


def test_a_store_of_smaller_pages_is_read(tmp_path):
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        db.execute("PRAGMA page_size=4096")
        db.execute("VACUUM")
    path = filled(tmp_path / "s")
    assert int.from_bytes(path.read_bytes()[16:18], "big") == 4096
    damage(path, 4096 * 9, b"\xaa" * 4096)
    found = everything(path)
    assert right(found) and COUNT - A_PAGE < len(found) < COUNT


def test_a_truncated_file_keeps_what_is_left_of_it(tmp_path):
    path = filled(tmp_path / "s")
    os.truncate(path, path.stat().st_size * 2 // 3)
    found = everything(path)
    assert right(found) and COUNT // 3 < len(found) < COUNT


def test_what_cannot_be_text_is_damage_too(tmp_path):
    path = filled(tmp_path / "s")
    damage(path, path.read_bytes().index(b"answer 1234 "), b"\xff\xfe\xff")
    found = everything(path)
    assert right(found) and len(found) == COUNT - 1 and key(1234) not in found


def test_a_file_that_is_no_store_is_kept_aside(tmp_path, caplog):
    (tmp_path / "s").write_text("this is not a database, and long enough to be taken for one " * 400)
    store = Store(tmp_path / "s")
    assert len(store) == 0 and "0 answers were saved" in caplog.text
    assert (tmp_path / "s.corrupt-1").read_text().startswith("this is not")


def test_damage_found_while_working_is_mended_and_the_work_goes_on(tmp_path):
    path = filled(tmp_path / "s")
    store = Store(path)
    damage(path, path.stat().st_size // PAGE // 2 * PAGE, b"\0" * PAGE)
    found = store.get([key(n) for n in range(COUNT)])
    missing = [n for n in range(COUNT) if key(n) not in found]
    assert 0 < len(missing) < A_PAGE
    store.add("user", "m", [key(n) for n in missing], [Answer(text(n), n, 1) for n in missing], 0.0)
    assert right(everything(path)) and len(everything(path)) == COUNT


def test_a_process_that_was_at_work_follows_when_another_mends(tmp_path):
    path = filled(tmp_path / "s")
    first = Store(path)
    assert first.get([key(0)])
    damage(path, path.stat().st_size // PAGE // 2 * PAGE, b"\0" * PAGE)
    everything(path)
    first.add("user", "m", ["new"], [Answer("kept", 1, 1)], 0.0)
    assert Store(path).get(["new"]) == {"new": "kept"}


def _get_all(path, queue):
    queue.put(len(everything(path)))


def test_two_processes_that_find_the_damage_mend_it_once(tmp_path):
    path = filled(tmp_path / "s")
    damage(path, path.stat().st_size // PAGE // 2 * PAGE, b"\0" * PAGE)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_get_all, args=(path, queue)) for _ in range(2)]
    [worker.start() for worker in workers]
    first, second = (queue.get(timeout=60) for _ in workers)
    assert COUNT - A_PAGE < first == second < COUNT
    [worker.join(60) for worker in workers]
    assert len(list(tmp_path.glob("s.corrupt-*"))) == 1


def test_what_only_the_log_holds_is_saved_too(tmp_path):
    path = filled(tmp_path / "s", COUNT - 5)
    store = Store(path)
    rest = range(COUNT - 5, COUNT)
    store.add("user", "m", [key(n) for n in rest], [Answer(text(n), n, 1) for n in rest], 0.0)
    for suffix in ("", "-wal"):  # as a killed process leaves them
        (tmp_path / f"t{suffix}").write_bytes((tmp_path / f"s{suffix}").read_bytes())
    damage(tmp_path / "t", 10 * PAGE, b"\xaa" * PAGE)
    found = everything(tmp_path / "t")
    assert right(found) and COUNT - A_PAGE < len(found) < COUNT and {key(n) for n in rest} <= found.keys()


def test_an_older_store_is_brought_up_and_a_newer_one_refused(tmp_path):
    with sqlite3.connect(tmp_path / "s") as db:
        db.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,"
            " prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, seconds REAL NOT NULL,"
            " created REAL NOT NULL) WITHOUT ROWID"
        )
        db.execute("INSERT INTO answers VALUES ('a', 'old', 'user', 'm', 1, 1, 1.0, 1.0)")
    db.close()
    store = Store(tmp_path / "s")
    store.add("user", "m", ["b"], [Answer("new", 1, 1, True)], 0.0)
    assert store.get(["a", "b"]) == {"a": "old", "b": "new"}
    with store.transaction() as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
        assert db.execute("SELECT origin, truncated FROM answers ORDER BY key").fetchall() == [("", 0), ("", 1)]
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    store.close()
    with pytest.raises(UserError, match="newer version"):
        Store(tmp_path / "s")


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    script = """
        import resource, sys
        from pathlib import Path
        from recbole_mllm.errors import UserError
        from recbole_mllm.mllm.base import Answer
        from recbole_mllm.summaries.store import Store
        store = Store(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            for n in range(10_000):
                store.add("user", "m", [f"k{n}"], [Answer("x" * 1000, 1, 1)], 0.0)
                print(n, flush=True)
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "s"], capture_output=True, text=True
    )
    *numbers, line = done.stdout.splitlines()
    assert "cannot be written" in line and "make room on the disk" in line and str(tmp_path / "s") in line
    store = Store(tmp_path / "s")
    assert (
        len(numbers) > 10 and len(store) == len(numbers) and len(store.get([f"k{n}" for n in numbers])) == len(numbers)
    )


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store .*s cannot be opened .*check the folder"):
        Store(tmp_path / "file" / "s")


def test_a_read_only_folder_is_one_line_and_the_store_stays_as_it_was():
    script = """
        import os, sys
        from pathlib import Path
        from recbole_mllm.errors import UserError
        from recbole_mllm.mllm.base import Answer
        from recbole_mllm.summaries.store import Store
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        try:
            Store(Path(sys.argv[1])).add("user", "m", ["new"], [Answer("a", 1, 1)], 0.0)
        except UserError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder) / "s", 10)
        before = path.read_bytes()
        path.chmod(0o444)
        path.parent.chmod(0o555)
        try:
            done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], capture_output=True, text=True)
        finally:
            path.parent.chmod(0o755)
        assert "make its folder writable" in done.stdout and str(path) in done.stdout and not done.stderr
        assert path.read_bytes() == before


def test_a_store_that_turns_read_only_is_one_line(tmp_path):
    store = Store(filled(tmp_path / "s", 10))
    store._db.execute("PRAGMA query_only = 1")  # what SQLite answers then is what it answers on a read-only disk
    with pytest.raises(UserError, match="cannot be opened for writing.*make its folder writable"):
        store.add("user", "m", ["new"], [Answer("a", 1, 1)], 0.0)
    assert len(store) == 10


def test_kill_9_at_any_moment_loses_nothing_that_was_committed(tmp_path):
    """25 writers, two at a time, each killed at a random moment; each says what was committed right after it was."""
    script = """
        import itertools, sys
        from pathlib import Path
        from recbole_mllm.mllm.base import Answer
        from recbole_mllm.summaries.store import Store
        import os
        path, rounds = Path(sys.argv[1]), int(sys.argv[2])
        for number in range(rounds):  # one Python, many short-lived writers
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                store = Store(path)
                for n in itertools.count():
                    keys = [f"{os.getpid()}-{n}-{i}" for i in range(5)]
                    store.add("user", "m", keys, [Answer(key, 1, 1) for key in keys], 0.0)
                    os.write(write, (" ".join(keys) + "\\n").encode())
            os.close(write)
            import random, signal, time
            random.seed(os.getpid() * 1000 + number)
            time.sleep(random.uniform(0.005, 0.08))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with os.fdopen(read) as said:
                sys.stdout.write(said.read())
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), tmp_path / "s"]
    drivers = [subprocess.Popen([*arguments, n], stdout=subprocess.PIPE, text=True) for n in ("13", "12")]
    said = " ".join(driver.communicate(timeout=120)[0] for driver in drivers).split()
    assert all(driver.returncode == 0 for driver in drivers) and len(said) > 100
    store = Store(tmp_path / "s")
    assert store.get(said) == {word: word for word in said}
    assert len(store) % 5 == 0 and not list(tmp_path.glob("*.corrupt-*"))


def test_random_damage_never_ends_in_anything_but_right_answers_or_a_clear_line(tmp_path):
    draw = random.Random(3)
    whole = filled(tmp_path / "whole").read_bytes()
    for n in range(12):
        path = tmp_path / f"s{n}"
        path.write_bytes(whole)
        for _ in range(3):
            damage(path, draw.randrange(len(whole) - 64), draw.randbytes(draw.choice((1, 8, 64))))
        try:
            found = everything(path)
        except UserError:
            continue
        assert len(found) > COUNT // 2
        assert sum(found[k] != text(i) for i in range(COUNT) if (k := key(i)) in found) <= 3  # bytes within a text


FOREIGN = {
    "another's tables": ["CREATE TABLE songs (a, b)", "INSERT INTO songs VALUES (1, 2)"],
    "answers of another shape": ["CREATE TABLE answers (id INTEGER, body TEXT)", "INSERT INTO answers VALUES (1, 'x')"],
    "answers of no type": [f"CREATE TABLE answers ({', '.join(Row._fields)})", "PRAGMA user_version = 1"],
    "a view": ["CREATE TABLE t (a)", "CREATE VIEW answers AS SELECT a FROM t"],
    "an index": ["CREATE TABLE t (a)", "CREATE INDEX answers ON t (a)"],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_database_of_something_else_is_left_as_it_is(what, tmp_path):
    path = tmp_path / "d.mllm.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        for statement in FOREIGN[what]:
            db.execute(statement)
    before = path.read_bytes()
    for opened in (lambda: Store(path), lambda: opened_store(tmp_path / "d"), lambda: KnownTexts(tmp_path / "d")):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / path.name).write_bytes(before)
        with pytest.raises(UserError, match=r"is an SQLite file of something else \(.*\); move it away") as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes() == before
    assert not list(tmp_path.rglob("*-wal")) and not list(tmp_path.rglob("*.corrupt-*"))


def test_a_table_of_another_shape_inside_a_store_is_told(tmp_path):
    store = Store(filled(tmp_path / "s", 3))
    with store.transaction(write=True) as db:
        db.execute("CREATE TABLE leases (a, b)")
    store.close()
    with pytest.raises(UserError, match="is an SQLite file of something else"):
        Store(tmp_path / "s")


def test_a_folder_or_a_dangling_link_in_its_place_is_one_line(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "t").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"s is no file; move it away, and a new store is made"):
        Store(tmp_path / "s")
    with pytest.raises(UserError, match=r"t is a link that leads nowhere; move it away"):
        Store(tmp_path / "t")
    assert not (tmp_path / "nothing").exists()


def test_an_empty_file_becomes_a_store_and_a_newer_one_is_refused_also_where_nothing_is_written(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / "d.mllm.sqlite"
    path.write_bytes(b"")
    assert KnownTexts(folder).get(["k"]) == {} and path.stat().st_size == 0
    store = Store(path)
    with store.transaction(write=True) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    store.close()
    with pytest.raises(UserError, match="written by a newer version"):
        KnownTexts(folder)
