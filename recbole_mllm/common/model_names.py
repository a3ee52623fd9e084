"""What the name of a model means, and what names its weights; nothing is loaded for it."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from recbole_mllm.common.errors import UserError

TINY = "tiny"
_WHOLE = 64 * 2**20  # files up to this many bytes are digested whole, larger ones by size, head and tail
_END = 2**20


def source_of(name: str) -> str:
    """Return the folder of the bundled model for `tiny`, else `name` itself."""
    if name.startswith("server:"):
        raise UserError(f"{name}: a model behind a server cannot be loaded here; give a hub id or a local folder")
    return str(Path(__file__).resolve().parents[1] / "demo" / "tiny") if name == TINY else name


def gguf_of(source: str) -> Path | None:
    """Return the ``.gguf`` file `source` is, or holds in place of a ``config.json``; None where it is no such thing.

    Raises:
        UserError: There is no such file, there are several, or the package that reads it is missing.
    """
    path = Path(source)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"model {source!r} is not there")
        found = [path]
    else:
        found = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"model {source!r} holds {len(found)} .gguf files; give the path of one")
    if find_spec("gguf") is None:
        raise UserError(f"reading {found[0].name} needs the gguf package: pip install 'recbole-mllm[gguf]'")
    return found[0]


def identity_of(name: str, revision: str | None) -> str:
    """Return what names the weights: a digest of a folder's files or of one file, or a hub id with its commit."""
    place = Path(source_of(name))
    if not place.exists():
        return f"{name}@{revision or 'main'}"
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")]
    root, digest = place.parent if place.is_file() else place, hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root)}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(size, _WHOLE) if size <= _WHOLE else _END))
            if size > _WHOLE:
                file.seek(-_END, 2)
                digest.update(file.read())
    return f"{place.name}#{digest.hexdigest()[:16]}"
