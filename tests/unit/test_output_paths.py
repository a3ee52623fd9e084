"""Every command that takes an output path, given paths that are not to be written to; and what convert leaves alone.

All of it runs without a privilege in a throwaway folder (`unprivileged`).
"""

import json
import textwrap

import pytest
import unprivileged
from raw_dumps import write_microlens

FILES = {
    "plan --json": "plan --dataset x --json",
    "inspect --output": "inspect x --output",
    "candidates export --out": "candidates export --dataset x --out",
    "store export --out": "store export x --out",
}
FOLDERS = {
    "export --out": "export x.pth --out",
    "benchmark --output_dir": "benchmark --dataset x --models Pop --output_dir",
    "convert --out": "convert microlens --raw RAW --out",
}

MODULES = [
    f"recbole_mllm.{name}" for name in ("evaluation.candidates_file", "summaries.store_tools", "inspect.health_page")
]


@pytest.fixture
def place():
    with unprivileged.throwaway() as folder:
        write_microlens(folder / "raw" / "dump", {str(u): ["1", "2", str(u)] for u in range(20)}, {"1": "one"})
        (folder / "home" / "thesis.tex").write_text("years of work")
        (folder / "theirs").mkdir()
        for name in ("note.txt", "README.md", "dataset.yaml", "leaderboard.csv", "d.inter"):
            (folder / "theirs" / name).write_text("mine")
        (folder / "theirs" / "empty").mkdir()
        (folder / "closed").mkdir()
        here = folder / "work" / "here"
        (here / "dataset" / "x").mkdir(parents=True)
        (here / "dataset" / "x" / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
        (here / "dataset" / "x" / "x.mllm.sqlite").write_bytes(b"")
        (here / "x.pth").write_text("no checkpoint")
        (here / "to-theirs").symlink_to(folder / "theirs")
        (here / "to-their-note").symlink_to(folder / "theirs" / "note.txt")
        (here / "to-home").symlink_to(folder / "home")
        (here / "to-nowhere").symlink_to(folder / "nowhere" / "x")
        (here / "loop").symlink_to(here / "loop")
        yield folder


REFUSED = """
    os.chmod(place / "closed", 0o555)
    here = place / "work" / "here"
    os.mkfifo(here / "pipe")
    for words, outs in json.loads((place / "cases.json").read_text()):
        for out in outs:
            said = io.StringIO()
            given = [word.replace("RAW", str(place / "raw" / "dump")) for word in words.split()]
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                code = main([*given, out.replace("PLACE", str(place))])
            print(words, out, code)
            lines = said.getvalue().splitlines()
            assert code == 2 and len(lines) == 1, (words, out, code, said.getvalue())
            assert f"{given[-1]} " in lines[0], (words, out, lines)
    os.chmod(place / "closed", 0o755)
    (here / "pipe").unlink()
"""


ROOTS = """
    import recbole_mllm.common.files as files
    for name in ("unlink", "rename", "replace", "rmdir", "mkdir", "scandir", "access"):
        setattr(os, name, None)  # whoever comes so far fails
    shutil.rmtree = None
    up = "/".join([".."] * 30)
    for out in ("/", "//", "/..", "/../..", "/.", up, f"{place}/{up}", "root-link"):
        for kind in (files.CONVERTED, files.EXPORT, files.BENCHMARK):
            try:
                files.check_folder(Path(out), kind, "--out")
            except UserError as error:
                assert "is a root or a mount point" in str(error), error
            else:
                raise AssertionError(out)
    files.os.path.ismount = lambda path: Path(path) == place / "home" / "disk"
    try:
        files.check_folder(place / "home" / "disk", files.CONVERTED, "--out")
    except UserError as error:
        assert "is a root or a mount point" in str(error), error
    else:
        raise AssertionError("a mount point")
"""


def test_no_command_writes_to_a_path_that_is_not_its_own(place):
    """Nor to a root however spelt, or a mount point, which are refused before anything is asked of them."""
    below = ["PLACE/closed/new/out", "PLACE/theirs/note.txt/out", "to-nowhere", "to-nowhere/out", "loop"]
    files = [*below, "PLACE/theirs/d.inter", "PLACE/theirs", ".", "to-their-note", "to-home", "pipe", "x.pth"]
    folders = [
        *(*below, "PLACE/theirs", "PLACE/theirs/note.txt", "to-theirs", "to-home", "to-their-note", "pipe"),
        *("PLACE/home", "PLACE", "PLACE/work", ".", "..", "./../here", "PLACE/work/./here/../here", "dataset/x"),
    ]
    raw = ["PLACE/raw", "PLACE/raw/dump", "PLACE/raw/../raw/dump"]
    cases = [(words, files) for words in FILES.values()]
    cases += [(words, [*folders, *(raw if "RAW" in words else [])]) for words in FOLDERS.values()]
    (place / "cases.json").write_text(json.dumps(cases))
    (place / "work" / "here" / "root-link").symlink_to("/")
    before = unprivileged.snapshot(place)
    unprivileged.run(textwrap.dedent(REFUSED) + textwrap.dedent(ROOTS), place, *MODULES)
    assert unprivileged.snapshot(place) == before


CONVERTED = """
    def convert(*more, code=0):
        said = io.StringIO()
        words = ["convert", "microlens", "--raw", str(place / "raw" / "dump"), "--out"]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            assert main([*words, *more]) == code, said.getvalue()
        return said.getvalue()
    out = str(place / "work" / "here" / "made" / "d")
    (place / "work" / "here" / "made").mkdir()
    convert(out)
    own = {"d.x-1234abcd.usum": "days", "d.mllm.sqlite": "weeks", "notes.md": "mine", "images.txt": "mine"}
    for name, text in own.items():
        (Path(out) / name).write_text(text)
    (Path(out) / "sub").mkdir()
    (Path(out) / "sub" / "d.inter").write_text("mine")
    convert(out, "--protocol", "paper")
    convert(out)
    assert {name: (Path(out) / name).read_text() for name in own} == own
    assert (Path(out) / "sub" / "d.inter").read_text() == "mine"
    assert sorted(p.name for p in Path(out).iterdir()) == sorted(
        [*own, "sub", "d.inter", "d.item", "dataset.yaml", "README.md", "manifest.json"]
    )
    for name in ("dataset.yaml", "d.inter"):
        kept = (Path(out) / name).read_text()
        (Path(out) / name).write_text(kept + "# mine")
        assert f"{name} was changed after it was written" in convert(out, code=2)
        assert (Path(out) / name).read_text() == kept + "# mine"
        (Path(out) / name).write_text(kept)
    (place / "empty").mkdir()
    convert(str(place / "empty"))  # a folder that is there, and empty
    (place / "work" / "here" / "link").symlink_to(place / "empty")
    (place / "raw" / "dump" / "MicroLens-made_pairs.tsv").write_text("1\\t2 3\\n4 5 6\\n")
    before = {p.name: p.read_bytes() for p in (place / "empty").iterdir()}
    convert(str(place / "empty"), code=2)
    assert before == {p.name: p.read_bytes() for p in (place / "empty").iterdir()}
    convert(str(place / "new"), code=2)
    assert not (place / "new").exists()
    (place / "kept").mkdir()
    convert(str(place / "kept"), code=2)
    assert list((place / "kept").iterdir()) == []
"""


FULL = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk, for files beyond it
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["convert", "microlens", "--raw", str(place / "raw" / "large"), "--out", str(place / "full")])
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("recbole-mllm:")]
    assert code == 2 and "File too large" in line and str(place / "full") in line, said.getvalue()
    assert not (place / "full").exists(), list((place / "full").iterdir())
"""


def test_converting_again_replaces_what_convert_wrote_and_keeps_all_else(place):
    """And a disk that is full leaves no half of a dataset."""
    write_microlens(place / "raw" / "large", {str(u): [str(n) for n in range(50)] for u in range(99)}, {"1": "one"})
    before = unprivileged.snapshot(place)
    unprivileged.run(textwrap.dedent(CONVERTED) + textwrap.dedent(FULL), place)
    after = unprivileged.snapshot(place)
    own = ("work/here/made", "work/here/link", "empty", "kept", "raw/dump/MicroLens-made_pairs.tsv")
    assert {name: what for name, what in after.items() if not name.startswith(own)} == {
        name: what for name, what in before.items() if not name.startswith(own)
    }
