"""Summaries by several real processes: the same files and as many prompts as in one; a killed one loses little."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import small_world
from launching import TORCHRUN
from planted_writers import Planted, StoreInMemory
from server_processes import served

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.mllm.interface import Answer, Decoding
from recbole_mllm.summaries.generator import CachedGenerator
from recbole_mllm.summaries.store import Store, opened_store

SCRIPT = Path(__file__).resolve().parents[1] / "shared_summaries.py"


def run(folder, processes, pause=0.0, killed=-1, after=0):
    """Return the exit code and what was said."""
    words = [str(SCRIPT), str(folder), str(pause), str(killed), str(after)]
    how = [sys.executable] if processes == 1 else [*TORCHRUN, f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*how, *words], capture_output=True, text=True, env=environment, timeout=200)
    return done.returncode, done.stderr


def asked(folder):
    """Return how often each prompt was asked, and how many each process asked."""
    files = sorted(folder.with_name(f"{folder.name}.asked").iterdir())
    lines = [file.read_text().split() for file in files]
    return Counter(line for part in lines for line in part), [len(part) for part in lines]


def summaries(folder):
    return {path.name.split(".", 1)[1]: path.read_bytes() for path in folder.glob("*sum")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "w"
    assert run(folder, 1)[0] == 0
    return summaries(folder), asked(folder)[0]


def test_two_processes_write_what_one_does_and_no_prompt_twice(tmp_path, alone):
    folder = tmp_path / "w"
    code, told = run(folder, 2, 0.01)
    assert code == 0, told[-2000:]
    prompts, parts = asked(folder)
    assert summaries(folder) == alone[0] and len(alone[0]) == 2
    assert prompts == alone[1] and set(prompts.values()) == {1}
    assert len(parts) == 2 and min(parts) > sum(parts) / 5
    assert run(folder, 1)[0] == 0 and asked(folder)[0] == prompts  # nothing is left to ask
    assert summaries(folder) == alone[0]


def test_kill_9_at_random_moments_loses_nothing_that_was_stored_and_changes_no_byte(tmp_path, alone):
    rng, folder, notes = random.Random(5), tmp_path / "w", tmp_path / "w.asked" / "0"
    for _ in range(3):
        before = notes.stat().st_size if notes.exists() else 0
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "0.01", "-1", "0"])
        while not notes.exists() or notes.stat().st_size == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.35))
        assert process.poll() is None, "the work was over before it could be killed"
        process.kill()
        process.wait()
    assert run(folder, 1)[0] == 0
    prompts, _ = asked(folder)
    assert summaries(folder) == alone[0] and set(prompts) == set(alone[1])
    assert sum(prompts.values()) <= sum(alone[1].values()) + 3 * 40  # at most what had not been committed, again
    assert not list(folder.glob(".*tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("after", "then"), [(25, 3), (25, 1), (150, 3)])
def test_what_a_killed_process_had_finished_is_kept_for_a_run_of_another_number(tmp_path, alone, after, then):
    folder = tmp_path / "w"
    code, told = run(folder, 2, 0.02, killed=1, after=after)
    assert code != 0
    assert asked(folder)[0] and not summaries(folder).get("t.usum")
    code, told = run(folder, then)
    assert code == 0, told[-2000:]
    prompts, _ = asked(folder)
    assert summaries(folder) == alone[0] and set(prompts) == set(alone[1])
    assert sum(prompts.values()) <= sum(alone[1].values()) + 2 * 34  # what the two had not yet committed


def test_what_processes_of_an_earlier_version_have_left_is_moved_into_the_store(tmp_path):
    folder = tmp_path / "w"
    for rank, numbers in ((0, range(50)), ("1-2", range(40, 90))):
        with closing(Store(folder / f"w.mllm.rank{rank}.sqlite")) as left:
            left.add("user", "m", [f"{n:064x}" for n in numbers], [Answer(f"text {n}", 1, 1) for n in numbers], 1.0)
    with closing(opened_store(folder)) as store:
        assert len(store) == 90 and store.get([f"{45:064x}"]) == {f"{45:064x}": "text 45"}
    assert [path.name for path in folder.iterdir()] == ["w.mllm.sqlite"]


def test_processes_on_several_machines_read_what_is_there_and_write_nothing(tmp_path, monkeypatch):
    store = StoreInMemory()
    CachedGenerator("user", Planted, "m", store, Decoding(9)).answer([Prompt("a")])
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert CachedGenerator("user", Planted, "m", store, Decoding(9)).answer([Prompt("a")]) == ["a"]
    with pytest.raises(UserError, match="several machines.*run `summarize` with the same settings on one machine"):
        CachedGenerator("user", Planted, "m", store, Decoding(9)).answer([Prompt("b")])


def summarize(folder, url, processes, *words):
    who = f"server:m@{url}"
    keys = [f"--item_summarizer={who}", f"--user_summarizer={who}", "--item_summary=text", "--use_image=false"]
    how = [sys.executable] if processes == 1 else [*TORCHRUN, f"--nproc_per_node={processes}"]
    command = [*how, str(SCRIPT.parents[1] / "run_recbole_mllm.py"), "summarize", "--dataset", "steps", *keys, *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_command_under_a_launcher_writes_and_refreshes_as_one_process_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with served(tmp_path, server=(0.0, "well")) as servers:
        url, counts = servers["server"].url, []
        for folder, processes in ((one, 1), (two, 2)):
            data = small_world.write(folder / "dataset", images=False)
            before = len(servers["server"].asked())
            told = summarize(folder, url, processes)
            assert len([line for line in told.splitlines() if line.endswith("sum")]) == 2  # said once
            first = len(servers["server"].asked())
            with (data / "steps.inter").open("a") as file:
                file.write("u03\ti50\t90\nu07\ti51\t91\nu08\ti52\t95\n")
            told = summarize(folder, url, processes, "--since", "91")
            assert "1 users have summaries to write from before --since 91 (u03)" in told
            counts.append((first - before, len(servers["server"].asked()) - first))
    assert counts[0] == counts[1] and counts[0][1] == 2
    assert summaries(one / "dataset" / "steps") == summaries(two / "dataset" / "steps")
