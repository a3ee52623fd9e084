"""The OpenAI client for one server, and what in the environment stands between the two."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from recbole_mllm.errors import UserError

_NO_KEY = "EMPTY"  # what servers without keys are sent


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
        transport = DefaultHttpxClient(follow_redirects=False, timeout=timeout)
    except (ImportError, ValueError, OSError) as error:  # httpx reads HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE and the like
        raise UserError(
            f"the client for servers cannot start with this environment ({' '.join(str(error).split())}); mend or "
            "unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, in small letters too, or SSL_CERT_FILE and SSL_CERT_DIR"
        ) from None
    return OpenAI(base_url=url, api_key=key or _NO_KEY, max_retries=0, timeout=timeout, http_client=transport)


def by_proxy(url: str) -> str:
    """Return words for a failed connection where the environment sends `url` to a proxy; else nothing."""
    parts, proxies = urlsplit(url), getproxies()
    if not (parts.scheme in proxies or "all" in proxies) or proxy_bypass(parts.hostname or ""):
        return ""
    return " (asked through the proxy of the environment; NO_PROXY names hosts to ask directly)"
