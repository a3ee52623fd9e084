"""What a record says that must mean the same on every machine: settings by what files hold, words without folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.records import plain_json
from recbole_mllm.common.model_names import identity_of

_PLACES = ("data_path", "checkpoint_dir", "retriever_dir", "image_dir", "note")
"""Keys that say where files lie, or what is said beside them."""

DECISIVE_FILES = ("candidates_file", "retriever_checkpoint", "prompt_style")
"""Keys that may name a file which decides what is ranked, and how: it counts by what it holds."""

_MODELS = ("mllm", "item_summarizer", "user_summarizer", "feature_encoder")

# Not what follows a letter, a digit or another slash: addresses and fractions are no paths
_PATH = re.compile(r"(?<![\w:/.~…-])/(?:[^\s/:'\"`,;()\[\]]+/)+([^\s/:'\"`,;()\[\]]*)")


def config_digest(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits of a run's whole configuration, files and local models counting by what they hold."""
    decisive = {key: value for key, value in config.items() if key not in _PLACES}
    decisive |= {key: _content(key, decisive[key]) for key in (*DECISIVE_FILES, *_MODELS) if key in decisive}
    return hashlib.sha256(json.dumps(plain_json(decisive), sort_keys=True).encode()).hexdigest()[:16]


def _content(key: str, value: Any) -> Any:
    """Return a digest for a path that is there, and `value` itself for anything else (a hub id, a style's name)."""
    if not isinstance(value, str | Path) or not Path(value).exists():
        return value
    if key in _MODELS:
        return identity_of(str(value), None)
    return hashlib.sha256(Path(value).read_bytes()).hexdigest() if Path(value).is_file() else value


def said_anywhere(words: str) -> str:
    """Return a sentence with its absolute paths cut: to what follows the working directory, elsewhere to the name."""
    here = f"{Path.cwd()}/"
    return _PATH.sub(lambda found: f"…/{found[1]}", words.replace(here, "") if here != "//" else words)
