"""``doctor``: what this installation is, what of it does not work, and what will be slow here."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types

from recbole_mllm.common.resources import TRANSFORMERS, is_usable_transformers
from recbole_mllm.recbole_patches.apply import PATCHES

RECBOLE = "1.2.1"
_NEEDED = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas", "scipy")
_EXTRAS = {"openai": "server", "plotly": "report", "bitsandbytes": "qlora", "gguf": "gguf", "codecarbon": "energy"}
_EXTRAS |= {"shtab": "cli"}
_HUB_S = 4.0
_LITTLE = 10e9  # bytes of free disk
_GB = 1e9


def examine(data: Path, tell: Callable[[str], None]) -> int:
    """Say what is found, line by line; return 1 where RecBole or a library that every run needs is not usable.

    Args:
        data: Where datasets lie, or would.
        tell: Takes each line.
    """
    tell(f"python        {platform.python_version()}, {platform.platform()}")
    missing = [name for name in _NEEDED if _version(name) is None]
    found_version = _version("transformers")
    is_old = found_version is not None and not is_usable_transformers(found_version)
    found = [f"{name} {_version(name) or '(missing)'}" for name in _NEEDED]
    tell(f"libraries     {', '.join(found)}")
    extras = [f"{name} {_version(name) or f'(missing: extra {extra})'}" for name, extra in _EXTRAS.items()]
    tell(f"optional      {', '.join(extras)}")
    broken = _recbole(missing)
    tell("recbole       " + (broken or f"{RECBOLE}, all {len(PATCHES)} changes to it are in place"))
    devices, slow = _devices()
    tell(f"devices       {devices}")
    cache = _hub_cache()
    tell(f"hub           {_hub()}")
    for name, folder in {"data": data, "model cache": cache, "temporary": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())).free
        tell(f"{name:<13} {folder}: {free / _GB:.1f} GB free")
        if free < _LITTLE:
            slow.append(f"little room in {folder}: a model's weights take 2 GB for each billion parameters")
    for line in slow or ["nothing that is known beforehand"]:
        tell(f"slow here     {line}")
    if missing:
        tell(f"not usable    {', '.join(missing)} missing: pip install {' '.join(missing)}")
    if is_old:
        tell(f"not usable    transformers {found_version} is too old: pip install 'transformers>={TRANSFORMERS}'")
    return 1 if missing or broken or is_old else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _recbole(missing: list[str]) -> str:
    """Return what is wrong with RecBole, "" for nothing: each module that we change is imported, so that we do."""
    found = _version("recbole")
    if found is None:
        return f"not installed: pip install recbole=={RECBOLE} (on Python 3.12 and later with --no-deps)"
    if found != RECBOLE:
        return f"{found} is installed; this plugin is made for {RECBOLE}: pip install recbole=={RECBOLE}"
    if missing:
        return f"{found}, which cannot be tried without {', '.join(missing)}"
    failed = dict[str, str]()
    for name in dict.fromkeys(patch.module for patch in PATCHES):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a library of another version raises
            failed[name] = f"{type(error).__name__}: {error}"
    if not failed:
        return ""
    name, why = next(iter(failed.items()))
    return f"{found}, but {len(failed)} of its modules cannot be loaded and changed, the first {name} ({why})"


def _devices() -> tuple[str, list[str]]:
    """Return the devices with their memory, and what will be slow on them."""
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    words = f"{cores} CPU cores, {memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB memory free"
    slow: list[str] = []
    try:
        import torch
    except Exception as error:  # a broken installation raises anything, and is what is asked about
        return f"{words}; torch cannot be loaded ({error})", slow
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if gpus:
        words += "; " + ", ".join(f"{gpu.name} ({gpu.total_memory / _GB:.0f} GB)" for gpu in gpus)
    elif torch.backends.mps.is_available():
        words += "; Apple GPU (mps)"
    else:
        fits = memory.available / 4 / _GB
        slow += [
            f"no GPU: models beyond about {max(0.1, fits):.1f} billion parameters do not fit in float32, and one of 2 "
            "billion takes seconds a prompt; a server writes summaries sooner (docs/servers.md), baselines take minutes"
        ]
    if (threads := torch.get_num_threads()) < cores:
        slow.append(f"torch uses {threads} of {cores} cores (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '-')})")
    if os.environ.get("RECBOLE_MLLM_FASTDATA") == "off":
        slow.append("RECBOLE_MLLM_FASTDATA=off: RecBole's own loops read the data")
    return words, slow


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except Exception:  # as above: its default is said instead
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(HF_HUB_CACHE)


def _hub() -> str:
    """Return whether the hub answers; decided within seconds, whatever the network does."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "not asked: HF_HUB_OFFLINE is set, models come from the cache alone"
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    said = [f"{url} does not answer within {_HUB_S:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_S):
                said.append(f"{url} answers")
        except urllib.error.HTTPError as error:
            said.append(f"{url} answers ({error.code})")
        except (OSError, ValueError) as error:
            said.append(f"{url} cannot be reached ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=ask, daemon=True)  # a name may take minutes to be looked up
    thread.start()
    thread.join(_HUB_S + 0.5)
    return said[-1] + ("" if " answers" in said[-1] else "; use a local folder, a cached model, or a server")
