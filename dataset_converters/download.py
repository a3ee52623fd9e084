"""Fetch images by URL: few at a time, again after a failure, never twice, and nothing but images of a sane size."""

from __future__ import annotations

import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from recbole_mllm.data.images import problem
from recbole_mllm.files import whole_file

_SUFFIXES = {"image/jpeg": ".jpg", "image/jpg": ".jpg", "image/png": ".png", "image/webp": ".webp"}
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_BLOCK = 1 << 16


class _Final(Exception):
    """Trying again would not help."""


@dataclass(frozen=True, slots=True)
class Downloader:
    """Fetches one image a call; any number of threads may call.

    Args:
        tries: Attempts at one image.
        timeout_s: Seconds without an answer after which an attempt has failed.
        wait_s: Seconds before the second attempt; doubled before each further one, and shaken by up to half.
        max_bytes: A larger answer is refused, whatever length it announces.
    """

    tries: int = 4
    timeout_s: float = 20.0
    wait_s: float = 1.0
    max_bytes: int = 20_000_000

    def __call__(self, url: str, stem: Path) -> tuple[Path | None, str]:
        """Put the image of `url` at `stem` plus its suffix, unless it is there; return its path, or None and why."""
        for suffix in dict.fromkeys(_SUFFIXES.values()):
            there = stem.with_name(stem.name + suffix)
            if there.is_file() and problem(there) is None:
                return there, ""
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                return self._fetch(url, stem), ""
            except _Final as error:
                return None, str(error)
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{url}: {error}"
        return None, f"{reason} (after {self.tries} attempts)"

    def _fetch(self, url: str, stem: Path) -> Path:
        if not url.startswith(("http://", "https://")):
            raise _Final(f"{url[:80]} is no http address")
        request = urllib.request.Request(url, headers={"User-Agent": "recbole-mllm", "Accept": "image/*"})
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as answer:
                return self._keep(url, answer, stem)
        except urllib.error.HTTPError as error:
            if error.code in _AGAIN:
                raise
            raise _Final(f"{url}: the server answers {error.code}") from error

    def _keep(self, url: str, answer: Any, stem: Path) -> Path:
        kind = answer.headers.get_content_type()
        if kind not in _SUFFIXES:
            raise _Final(f"{url}: the server sends {kind}, not a jpeg, png or webp image")
        target = stem.with_name(stem.name + _SUFFIXES[kind])
        with whole_file(target, binary=True, sweep=False) as file:
            self._write(url, answer, file)
            file.flush()
            trouble = problem(Path(file.name))
            if trouble is not None:
                raise _Final(f"{url}: {trouble}")
        return target

    def _write(self, url: str, answer: Any, file: IO[bytes]) -> None:
        announced, got = answer.headers.get("Content-Length"), 0
        while block := answer.read(_BLOCK):
            got += len(block)
            if got > self.max_bytes:
                raise _Final(f"{url}: more than {self.max_bytes:,} bytes")
            file.write(block)
        if announced is not None and announced.isdigit() and got != int(announced):
            raise OSError(f"{got} bytes of {announced}")


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that knows http and https alone, so that no redirect can lead to a file of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


_OPENER = _opener()
