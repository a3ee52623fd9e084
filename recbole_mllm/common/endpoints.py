"""``server:MODEL@http://host:port/v1[,http://host2:port/v1…]``: which model to ask, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from recbole_mllm.common.errors import UserError

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
