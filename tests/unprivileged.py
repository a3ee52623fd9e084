"""Run a script that may destroy something: without a privilege, in a throwaway folder, and unable to change others."""

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534

_PRELUDE = """
import contextlib, ctypes, io, json, os, resource, shutil, sys
from pathlib import Path

import dataset_converters.options, recbole_mllm.cli{modules}
from recbole_mllm.cli import main
from recbole_mllm.common.errors import UserError

place = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid({nobody}, {nobody}, {nobody})
    os.setresuid({nobody}, {nobody}, {nobody})
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # no new privileges
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
assert os.geteuid() != 0 and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, "still privileged"
os.environ["HOME"] = str(place / "home")
os.chdir(place / "work" / "here")
touched = []

def guarded(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        folder = kwargs.get("dir_fd")
        for given in args[: 2 if name in ("replace", "rename", "link", "symlink") else 1]:
            base = os.readlink(f"/proc/self/fd/{{folder}}") if folder is not None else os.getcwd()
            path = Path(os.path.realpath(Path(base, os.fspath(given)).parent)) / Path(given).name
            if not path.is_relative_to(place):
                touched.append((name, str(path)))
                raise AssertionError(f"{{name}} of {{path}}")
        return real(*args, **kwargs)
    setattr(os, name, call)

for name in ("unlink", "remove", "rename", "replace", "rmdir", "mkdir", "link", "symlink"):
    guarded(name)
"""


@contextmanager
def throwaway() -> Iterator[Path]:
    """Yield a folder that the script owns, with a home and a working folder in it; pytest's own are closed to it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        (place / "home").mkdir()
        (place / "work" / "here").mkdir(parents=True)
        yield place


def run(script: str, place: Path, *modules: str) -> str:
    """Run `script` in `place`; return what it printed. It fails where it would change anything outside, or may.

    `modules` are loaded first, as Python's own may be closed to others.
    """
    if os.geteuid() == 0:
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    code = (
        _PRELUDE.format(nobody=NOBODY, modules="".join(f", {name}" for name in modules))
        + textwrap.dedent(script)
        + "\nassert not touched, touched\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def snapshot(place: Path) -> dict[str, tuple[int, str, bytes]]:
    """Return every entry below `place`: its mode, where it leads, and what it holds."""
    out = {}
    for path in sorted(place.rglob("*")):
        link = os.readlink(path) if path.is_symlink() else ""
        held = path.read_bytes() if path.is_file() and not link else b""
        out[str(path.relative_to(place))] = (path.lstat().st_mode, link, held)
    return out
