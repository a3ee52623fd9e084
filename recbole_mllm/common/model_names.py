"""What the name of a model means, here or behind servers, and what names its weights; nothing is loaded for it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

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


PREFIX = "server:"
_FORM = "server:MODEL@http://host:port/v1[,http://host2:port/v1]"
_SPEC = re.compile(r"server:(?P<model>.*?)@(?P<urls>[A-Za-z][A-Za-z0-9+.-]*://.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model's name as its servers know it, and the base URLs of the servers that share the work."""

    model: str
    urls: tuple[str, ...]

    @property
    def identity(self) -> str:
        """What stands for the model in the store's keys: its name, not the host, so that moving redoes no work."""
        return f"{PREFIX}{self.model}"


def is_server(name: str | None) -> bool:
    """Return whether `name` asks for a model behind a server."""
    return name is not None and name.startswith(PREFIX)


def parse_endpoint(text: str, key: str) -> Endpoint:
    """Read what stands in the setting `key`.

    Raises:
        UserError: It has another form, names no model, or a URL is not plain http or https. What could be a secret
            (user, password, query) is refused without being repeated.
    """
    found = _SPEC.fullmatch(text)
    if found is None or not found["model"].strip():
        raise UserError(f"{key} must read {_FORM}, with the model's name as the server's /v1/models lists it")
    urls = [url.strip().rstrip("/") for url in found["urls"].split(",")]
    for number, url in enumerate(urls, start=1):
        _check(url, f"{key}, URL {number}")
    return Endpoint(found["model"].strip(), tuple(dict.fromkeys(urls)))


def _check(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"{where}: the host or port cannot be read; write {_FORM}") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(f"{where}: no user, password or query in a URL; a key is read from the environment alone")
    if parts.scheme.lower() not in ("http", "https"):
        raise UserError(f"{where}: {parts.scheme}:// is neither http nor https")
    if not host or re.search(r"\s", url):
        raise UserError(f"{where}: no host in it; write {_FORM}")
