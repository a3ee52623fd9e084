"""Nothing that is not ours is written over or removed, whatever path is given; what is ours is whole or absent."""

import json
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from full_disk import files_up_to
from safetensors.torch import save_file

from recbole_mllm.common.checkpoint import on_disk, whole_folder, write_checkpoint
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import (
    BENCHMARK,
    BUILTIN,
    CONVERTED,
    EXPORT,
    check_file,
    check_folder,
    make_once,
    outputs_of,
    publish,
    recover,
    set_folder_aside,
    staged,
    sweep_scratch,
    whole_file,
    whole_text,
    write_text,
)

ROOT = Path(__file__).resolve().parents[2]

# What removes, renames or overwrites a file; a text's own ``replace`` takes two arguments
CHANGES = re.compile(
    r"\.(rmtree|unlink|rmdir|removedirs|renames|move|copyfile|copytree|copy2|write_text|write_bytes|symlink_to"
    r"|hardlink_to|truncate)\(|\b(?:os|shutil)\.(replace|rename|remove|copy|link|symlink)\(|\.(replace|rename)\([^,()=]+\)"
    r"|(?<!def )\b(open)\([^\n]*\"[wx]b?t?\+?\""
)
ELSEWHERE = {
    ("recbole_mllm/common/console.py", "open"),  # of nothing, in the place of a stream that is closed
    ("recbole_mllm/benchmark/process.py", "open"),  # a run's log, in its own folder
    ("recbole_mllm/benchmark/records.py", "truncate"),  # a torn last line
    ("recbole_mllm/model/score_cache.py", "truncate"),
    ("recbole_mllm/training/model_export.py", "copyfile"),  # into a folder that is being written
    ("recbole_mllm/cli/commands.py", "copyfile"),  # into a temporary folder
    ("dataset_converters/split.py", "copyfile"),
}


def test_no_other_module_removes_renames_or_overwrites_files():
    found = set()
    for path in [*(ROOT / "recbole_mllm").rglob("*.py"), *(ROOT / "dataset_converters").rglob("*.py")]:
        names = {next(filter(None, groups)) for groups in CHANGES.findall(path.read_text(encoding="utf-8"))}
        found |= {(str(path.relative_to(ROOT)), name) for name in names}
    ours = {name for path, name in found if path == "recbole_mllm/common/files.py"}
    assert ours >= {"rmtree", "unlink", "replace", "rename"}
    assert {place for place in found if place[0] != "recbole_mllm/common/files.py"} == ELSEWHERE


def test_a_file_is_as_open_as_the_umask_says_and_a_link_is_not_followed(tmp_path):
    (tmp_path / "of-the-user").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "of-the-user")
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "ours")
    finally:
        os.umask(before)
    assert (tmp_path / "of-the-user").read_text() == "mine" and not (tmp_path / "x").is_symlink()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_compressed_text_has_one_form(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with whole_text(tmp_path / name) as file:
            file.write("one\n")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_full_disk_is_told_with_the_file_it_met(tmp_path):
    with files_up_to(50_000), pytest.raises(OSError) as found, whole_file(tmp_path / "x", binary=True) as file:
        file.write(bytes(100_000))
    assert found.value.filename == str(tmp_path / "x") and list(tmp_path.iterdir()) == []


def fill(folder: Path, files: Mapping[str, str]) -> Path:
    """Write `files` with a manifest as `convert` leaves it."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    listed = [entry for entry in outputs_of(folder) if entry["file"] in files]
    (folder / "manifest.json").write_text(json.dumps({"converter": "csv", "outputs": listed}))
    return folder


def test_an_output_of_ours_is_taken_again_and_what_is_not_is_named(tmp_path):
    ours = fill(tmp_path / "d", {"d.inter": "old", "dataset.yaml": "a: 1"})
    (ours / "d.mllm.sqlite").write_text("summaries cost days")
    check_folder(ours, CONVERTED, "--out")
    with pytest.raises(UserError, match=r"already holds d\.inter, .* and is not a benchmark's results; give a new"):
        check_folder(ours, BENCHMARK, "--out")
    with pytest.raises(UserError, match=r"holds d\.item, which is not of the earlier output"):
        (ours / "d.item").write_text("the user's")
        check_folder(ours, CONVERTED, "--out", writes=["d.item"])
    with pytest.raises(UserError, match=r"dataset\.yaml was changed after it was written"):
        (ours / "dataset.yaml").write_text("a: 2")
        check_folder(ours, CONVERTED, "--out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"manifest_version": 3, "name": "an extension of a browser"}'),
        ("manifest.json", "[" * 100_000), ("manifest.json", '{"converter": 1, "outputs": "all"}'),
        ("manifest.json", "\0\xff"), ("runs.jsonl", '{"epoch": 1}\n{"epoch": 2}\n'),
        ("export.json", '{"written_by": "somebody"}'), ("dataset.yaml", "mine: true"), (".hidden", ""),
    ],
)  # fmt: skip
def test_a_folder_that_only_looks_like_ours_is_refused(tmp_path, name, content):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text(content, encoding="utf-8")
    for kind in (CONVERTED, BUILTIN, EXPORT, BENCHMARK):
        with pytest.raises(UserError, match="already holds"):
            check_folder(tmp_path / "d", kind, "--out")


@pytest.mark.parametrize("content", ["", '{"run_id": "a"}\n', 'torn\n{"run_id": "a"}\n'])
def test_results_are_known_by_their_records(tmp_path, content):
    (tmp_path / "runs.jsonl").write_text(content)
    (tmp_path / "note.txt").write_text("ours")
    check_folder(tmp_path, BENCHMARK, "--output_dir")


def test_a_manifest_that_names_other_places_removes_nothing_there(tmp_path):
    for place in ("victim", "d/sub/victim"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("mine")
    ours, outside = tmp_path / "d", tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("mine")
    (ours / "link").symlink_to(outside)
    fill(ours, {"d.inter": "old"})
    about = json.loads((ours / "manifest.json").read_text())
    about["outputs"] += [{"file": name} for name in ("../victim", str(tmp_path / "victim"), "sub/victim", "..", "", 7)]
    about["outputs"] += [{"file": "sub"}, {"file": "link", "outputs": [{"file": "victim"}]}, 3, None]
    (ours / "manifest.json").write_text(json.dumps(about))
    with staged(ours, "d") as stage:
        fill(stage, {"d.inter": "new"})
        publish(stage, ours, CONVERTED)
    assert (ours / "d.inter").read_text() == "new"
    for place in ("victim", "d/sub/victim", "outside/victim"):
        assert (tmp_path / place).read_text() == "mine"


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do `work` in a process that ends, as under ``kill -9``, before its change number `step` of a folder; say whether
    it did."""
    child = os.fork()
    if child:
        return bool(os.waitpid(child, 0)[1])
    left = step

    def mortal(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rename", "rmdir", "mkdir"):
        setattr(os, name, mortal(getattr(os, name)))
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_what_a_killed_process_was_making_is_removed_by_the_next_and_what_a_living_one_makes_is_not(tmp_path):
    def make() -> None:
        with staged(tmp_path, "d") as stage:
            (stage / "half").write_text("")
            os._exit(9)

    assert killed_at(100, make) and len(list(tmp_path.iterdir())) == 1
    with staged(tmp_path, "d") as stage:
        assert list(tmp_path.iterdir()) == [stage.parent]
        (stage / "half").write_text("")
        with staged(tmp_path, "d"):
            assert (stage / "half").is_file()
        with pytest.raises(UserError, match="another process is writing there"):
            check_folder(tmp_path, CONVERTED, "--out")
    assert list(tmp_path.iterdir()) == []


def test_results_that_make_room_take_a_free_name(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "note.txt").write_text("old")
    (tmp_path / "demo.1").mkdir()
    (tmp_path / "demo.2").symlink_to(tmp_path / "nowhere")
    assert set_folder_aside(tmp_path / "demo") == tmp_path / "demo.3"
    assert (tmp_path / "demo.3" / "note.txt").read_text() == "old" and not (tmp_path / "demo").exists()
    (tmp_path / "demo").symlink_to(tmp_path / "demo.3")
    with pytest.raises(UserError, match="is a link"):
        set_folder_aside(tmp_path / "demo")


def test_a_file_is_taken_where_it_is_new_empty_or_of_its_kind(tmp_path):
    def check(name: str) -> Path:
        return check_file(tmp_path / name, "--out", lambda head: head.startswith(b"ours"), "ours")

    (tmp_path / "empty").touch()
    (tmp_path / "ours").write_text("ours")
    with whole_text(tmp_path / "ours.gz") as file:
        file.write("ours, packed")
    (tmp_path / "link").symlink_to("ours")
    for name in ("new", "deep/down/new", "empty", "ours", "ours.gz"):
        assert check(name) == tmp_path / name
    assert check("link") == tmp_path / "ours"
    with whole_file(tmp_path / "theirs.gz", binary=True) as file:
        file.write(b"\x1f\x8b no gzip at all")
    with pytest.raises(UserError, match="there already and is not ours"):
        check("theirs.gz")


OLD = {"d.inter": "old", "d.item": "old", "dataset.yaml": "old"}
NEW = {"d.inter": "new", "rejected.tsv": "new", "dataset.yaml": "new"}


def test_an_output_cut_short_anywhere_is_old_or_absent_and_the_next_run_makes_it_new(tmp_path):
    seen, there = [], dict[str, str]()

    def look(folder: Path) -> dict[str, str]:
        return {name: (folder / name).read_text() for name in OLD | NEW if (folder / name).exists()}

    def replace() -> None:
        with staged(ours, "d") as stage:
            fill(stage, NEW)
            publish(stage, ours, CONVERTED)

    for step in range(100):
        ours = tmp_path / f"{step}" / "d"
        ours.mkdir(parents=True)
        fill(ours, OLD)
        (ours / "mine.txt").write_text("mine")
        ended = not killed_at(step, replace)
        there = look(ours)
        state = "old" if there == OLD else "new" if there == NEW else "absent"
        assert state != "absent" or "d.inter" not in there, (step, there)
        recover(ours, CONVERTED)
        assert look(ours) == (OLD if state == "old" and there == look(ours) else NEW)
        check_folder(ours, CONVERTED, "--out")
        others = {path.name for path in ours.iterdir() if not path.name.startswith(".")} - set(look(ours))
        assert others == {"manifest.json", "mine.txt"} and (ours / "mine.txt").read_text() == "mine"
        seen.append(state)
        if ended:
            break
    assert list(dict.fromkeys(seen)) == ["old", "absent", "new"]


# One maker for many


def test_many_at_once_make_it_once_and_all_read_the_whole(tmp_path):
    path, made = tmp_path / "retriever-x.pth", []

    def make(scratch: Path) -> None:
        made.append(scratch)
        scratch.write_text("half")
        time.sleep(0.1)
        scratch.write_text("whole")

    def read(_: int) -> str:
        make_once(path, make)
        return path.read_text()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read, range(3))) == ["whole"] * 3
    assert len(made) == 1


def test_after_kill_9_the_next_one_makes_it_and_removes_what_was_left_and_nothing_else(tmp_path):
    path = tmp_path / "x.tag-a"

    def die(scratch: Path) -> None:
        scratch.write_text("half")
        os._exit(9)

    assert killed_at(100, lambda: make_once(path, die) and None)
    assert list(tmp_path.glob(".x.tag-a.*.tmp/*/x.tag-a")) and not path.exists()
    others = (".x.tag-ab.recbole-mllm-12345678.tmp", ".x.tag-a.mine.0.tmp", ".x.tag-a.12345678.tmp")
    for name in others:
        (tmp_path / name).mkdir()
    assert make_once(path, lambda scratch: scratch.write_text("whole") and None)
    assert path.read_text() == "whole"
    assert {left.name for left in tmp_path.iterdir()} == {".x.tag-a.lock", path.name, *others}
    assert not make_once(path, lambda scratch: scratch.unlink())


def test_a_scratch_folder_gives_up_what_was_made_in_it_and_nothing_else(tmp_path):
    killed, foreign = (tmp_path / f".d.recbole-mllm-{digits}.tmp" for digits in ("0123abcd", "4567abcd"))
    (killed / "d").mkdir(parents=True)
    (killed / "locked").touch()
    (killed / "d" / "half.txt").touch()
    (killed / "mine.txt").write_text("a user's")
    foreign.mkdir()
    (foreign / "d").write_text("no lock beside it")
    sweep_scratch(tmp_path, "d")
    assert [path.name for path in killed.iterdir()] == ["mine.txt"]
    assert (foreign / "d").read_text() == "no lock beside it"


# Checkpoints


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(tmp_path):
    path, folder = tmp_path / "run.pth", tmp_path / "run"

    def write(size):
        write_checkpoint({"weight": torch.zeros(size)}, path)

    def adapt(size):
        with whole_folder(folder) as fresh:
            save_file({"weight": torch.zeros(size)}, fresh / "adapter.safetensors")

    write(10)
    adapt(10)
    before = path.read_bytes(), (folder / "adapter.safetensors").read_bytes()
    with files_up_to(50_000):
        with pytest.raises(UserError, match=rf"checkpoint {path} cannot be written \(File too large\); make room"):
            write(100_000)
        with pytest.raises(UserError, match=rf"checkpoint {folder} cannot be written \(.*--checkpoint_dir"):
            adapt(100_000)
    assert before == (path.read_bytes(), (folder / "adapter.safetensors").read_bytes())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run", "run.pth"]


def test_what_is_not_the_disks_doing_is_not_blamed_on_it(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "saved"
    with pytest.raises(UserError, match=r"file/saved cannot be written \(Not a directory\)"), on_disk(folder):
        folder.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="a bug"), on_disk(tmp_path):
        raise RuntimeError("a bug")
