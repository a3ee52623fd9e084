"""Push a folder to the Hugging Face Hub with the user's own login: what is said is checked before anything is sent."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from recbole_mllm.common.errors import UserError, first_line

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OPTION = "--push-to-hub"


def check_can_push(repo_id: str) -> None:
    """Refuse what cannot be pushed, before anything is written or sent.

    Raises:
        UserError: `repo_id` is no OWNER/NAME, the hub is switched off, or nobody is logged in.
    """
    import huggingface_hub as hub

    if not _ID.fullmatch(repo_id):
        raise UserError(f"{_OPTION} {repo_id!r} must be OWNER/NAME, as on the hub")
    if hub.is_offline_mode():
        raise UserError(
            f"{_OPTION} needs the hub, and HF_HUB_OFFLINE switches it off; unset it, or leave {_OPTION} out"
        )
    if not hub.get_token():
        raise UserError(
            f"{_OPTION} needs a login: run `hf auth login`, or put a token into HF_TOKEN; nothing was written"
        )


def push(repo_id: str, folder: Path, files: Sequence[str], *, kind: Literal["model", "dataset"]) -> str:
    """Send `files` of `folder` to the hub as one commit; return its URL.

    The repository is made private where there is none; one that is there stays as visible as it is. A README.md that a
    dataset's repository has already stays.

    Raises:
        UserError: The hub cannot be reached or refuses it; what was written on this machine stays.
    """
    import huggingface_hub as hub

    for name in ("httpx", "httpx2"):  # a line a request, with addresses that are as good as a key for a while
        logging.getLogger(name).setLevel(logging.WARNING)
    api = hub.HfApi()
    try:
        api.create_repo(repo_id, repo_type=kind, private=True, exist_ok=True)
        there = {"README.md"} if kind == "dataset" and api.file_exists(repo_id, "README.md", repo_type=kind) else set()
        chosen = [name for name in files if name not in there]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=kind,
            allow_patterns=chosen,
            commit_message="Published by recbole-mllm",
        )
        return str(commit.commit_url)
    except Exception as error:  # whatever the hub's client, its HTTP client or the disk may raise
        why = first_line(error)
        token = hub.get_token()
        why = why.replace(token, "***") if token else why
    # outside of the handler: no traceback chains a request and its headers
    raise UserError(f"{repo_id} was not pushed ({why}); what was written on this machine stays, push it again")


def license_of(card: Path | None) -> dict[str, Any]:
    """Return the licence that the model card at `card` states, as metadata of another card; {} where it states none."""
    import huggingface_hub as hub

    with suppress(OSError, ValueError, TypeError, AttributeError):
        data: Mapping[str, Any] = hub.ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card else {}
        return {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}
    return {}
