"""The OpenAI client for one server, and what in the environment stands between the two."""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from recbole_mllm.errors import UserError

_NO_KEY = "EMPTY"  # what servers without keys are sent
MOST_BYTES = 1 << 23  # of an answer, unpacked; a completion has some thousands, a long list of models a million


class UnusableReply(Exception):
    """What a server sends is longer than any answer, or goes on past the time for the whole of it."""


def make_client(url: str, key: str | None, timeout: float) -> Any:
    """Return a client that follows no redirect and leaves retries to us: they move on to another server.

    Raises:
        UserError: It is not installed, or the environment names a proxy or certificates that it cannot take.
    """
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError:
        raise UserError('models behind a server need the client: pip install "recbole-mllm[server]"') from None
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):  # a line a request, headers at debug level
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        transport = _bounded(DefaultHttpxClient)(follow_redirects=False, timeout=timeout)
    except (ImportError, ValueError, OSError) as error:  # httpx reads HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE and the like
        raise UserError(
            f"the client for servers cannot start with this environment ({' '.join(str(error).split())}); mend or "
            "unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, in small letters too, or SSL_CERT_FILE and SSL_CERT_DIR"
        ) from None
    return OpenAI(base_url=url, api_key=key or _NO_KEY, max_retries=0, timeout=timeout, http_client=transport)


def _bounded(client: Any) -> Any:
    """Return the client's class such that an answer has so many seconds and bytes, all told.

    Its own timeout is of each read, so a byte now and then would hold a request for ever.
    """

    class Bounded(client):  # type: ignore[misc]
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            seconds = request.extensions.get("timeout", {}).get("read")
            end = None if seconds is None else time.monotonic() + seconds
            response = super().send(request, stream=True, **options)
            if stream:
                return response
            try:
                content = _read(response, end, seconds)
            finally:
                response.close()
            kept = [pair for pair in response.headers.multi_items() if pair[0].lower() not in _OF_THE_WIRE]
            whole = type(response)(response.status_code, headers=kept, content=content, request=request)
            whole.elapsed = response.elapsed
            return whole

    return Bounded


_OF_THE_WIRE = ("content-encoding", "transfer-encoding", "content-length")  # no longer true of what has been read


def _read(response: Any, end: float | None, seconds: float | None) -> bytes:
    parts, size = [], 0
    for part in response.iter_bytes():
        size += len(part)
        if size > MOST_BYTES:
            raise UnusableReply(f"an answer of more than {MOST_BYTES:,} bytes")
        if end is not None and time.monotonic() > end:
            raise UnusableReply(f"no whole answer within {seconds:g} s")
        parts.append(part)
    return b"".join(parts)


def by_proxy(url: str) -> str:
    """Return words for a failed connection where the environment sends `url` to a proxy; else nothing."""
    parts, proxies = urlsplit(url), getproxies()
    if not (parts.scheme in proxies or "all" in proxies) or proxy_bypass(parts.hostname or ""):
        return ""
    return " (asked through the proxy of the environment; NO_PROXY names hosts to ask directly)"
