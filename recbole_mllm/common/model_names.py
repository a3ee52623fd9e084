"""What the name of a model means, here or behind servers, and what names its weights; nothing is loaded for it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.progress import warn_once

TINY = "tiny"
PRESETS = (
    ("smolvlm2-500m", "0.51 B parameters, 12 GB to train"),
    ("qwen3-vl-2b", "2.13 B, 19 GB"),
    ("qwen3-vl-8b", "8.77 B, 37 GB"),
)
"""A small, a middle and a large model for `no_model`, with the memory that docs/backbones.md says."""
_WHOLE = 64 * 2**20  # files up to this many bytes are digested whole, larger ones by size, head and tail
_END = 2**20
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def no_model() -> UserError:
    """Return the error that no model is set; the bundled one is no silent default outside the demo."""
    presets = ", ".join(f"{name} ({size})" for name, size in PRESETS)
    return UserError(
        f"mllm names no model; take a preset by its size, --config_files {presets}, or set mllm to a hub id or a "
        f"folder; --mllm={TINY} is the bundled model of the demo, for a trial"
    )


def source_of(name: str) -> str:
    """Return the folder of the bundled model for `tiny`, a hub id without its revision, else `name` itself."""
    if name.startswith("server:"):
        raise UserError(f"{name}: a model behind a server cannot be loaded here; give a hub id or a local folder")
    return str(Path(__file__).resolve().parents[1] / "demo" / "tiny") if name == TINY else _parts(name)[0]


def revision_of(name: str) -> str | None:
    """Return the revision that stands behind a hub id (see `pinned`)."""
    return _parts(name)[1]


def _parts(name: str) -> tuple[str, str | None]:
    """Return the hub id and the revision of ``org/name@revision``; a path is a path, whatever is in it."""
    source, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return source, revision or None


def pinned(name: str, revision: str | None = None) -> str:
    """Return a hub id with the commit behind an ``@`` that `revision` (None: its main branch) stands for.

    Whatever loads a model takes such a name. Where nobody can say which commit is meant, which a line tells, the name
    comes back with the `revision` as it was given; any other name (`tiny`, a path) as it is.

    Raises:
        UserError: A revision of something that has none.
    """
    if name == TINY or Path(name).exists():
        if revision is not None:
            raise UserError(f"{name} is a local model, which has no revision {revision!r}; leave the revision out")
        return name
    if not _HUB_ID.fullmatch(name):  # a path with nothing there: said when it is loaded
        return name
    commit = _commit(name, revision)
    if commit is None:
        key = f"{name}@{revision or 'main'}"
        warn_once(
            f"{key}: neither the local cache nor the hub says which commit that is, so its answers are stored under "
            "this name; a commit can also be given as the revision"
        )
    return f"{name}@{commit or revision}" if commit or revision else name


@cache
def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit that the local cache, else the hub, knows a revision by; the same all through a process.

    The cache comes first, so that a model stays what it is until somebody downloads another.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import RevisionResolutionError

    for local in (True, False):
        try:
            return str(HfApi().resolve_revision(name, revision=revision, local_files_only=local).resolved)
        except Exception as error:  # no such model, no network, no right to it: said when it is loaded
            if isinstance(error, RevisionResolutionError) and not (local or is_offline_mode()):
                _use_the_cache_alone()  # raised by a hub out of reach alone, and by a cache that was asked alone
    return None


def _use_the_cache_alone() -> None:
    """Switch the hub off for this process and those it starts: each of ten files would be asked for five times."""
    from huggingface_hub import constants

    warn_once("the hub cannot be reached; this run reads the local cache alone")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def former_identity(name: str) -> str | None:
    """Return what `identity_of` the newest commit of a hub's main branch was before it was known; else None."""
    source, commit = _parts(name)
    return f"{source}@main" if commit and commit == _commit(source, None) else None


def is_same(recorded: str, identity: str) -> bool:
    """Return whether `recorded` may name the same weights: an earlier version recorded no commit."""
    return recorded in (identity, re.sub(r"@[0-9a-f]{40}(?=:|$)", "@main", identity))


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


def identity_of(name: str) -> str:
    """Return what names the weights: a digest of a folder's files or of one file, or a hub id with its revision."""
    place = Path(source := source_of(name))
    if not place.exists():
        return f"{source}@{revision_of(name) or 'main'}"
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
    revision: str | None = None  # as the user has said it: a server says none

    @property
    def identity(self) -> str:
        """What stands for the model in the store's keys: its name, not the host, so that moving redoes no work."""
        return f"{PREFIX}{self.model}" + (f"@{self.revision}" if self.revision else "")


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
