"""A server on loopback that speaks as much of the hub as creating a repository and committing files to it takes."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from planned_server import Handler, listening

TOKEN = "hf_noFileOrLogMayHoldThis"


@dataclass
class Hub:
    """Repositories by ``models/OWNER/NAME`` (or ``datasets``): what they were made with, and the files they hold."""

    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorization
    refuses: int = 0  # a status for every commit
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer a request."""
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('type', 'model')}s/{told['organization']}/{told['name']}"
            known = name in self.made
            self.made.setdefault(name, told)
            self.files.setdefault(name, {})
            return (409 if known else 200), {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "HEAD":  # /datasets/OWNER/NAME/resolve/main/FILE
            return (200 if parts[-1] in self.files.get("/".join(parts[:3]), {}) else 404), {}
        if parts[0] == "api" and parts[4:5] == ["preupload"]:
            asked = json.loads(body)["files"]
            return 200, {
                "files": [{"path": f["path"], "uploadMode": self._mode(f), "shouldIgnore": False} for f in asked]
            }
        if parts[0] == "api" and parts[4:5] == ["commit"]:
            return self._commit("/".join(parts[1:4]), body)
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if method == "PUT" and parts[0] == "large":
            self.large[parts[1]] = body
            return 200, {}
        return 404, {"error": f"{method} {path} is not spoken here"}

    @staticmethod
    def _mode(file: dict[str, Any]) -> str:
        return "lfs" if file["path"].endswith((".safetensors", ".gz")) else "regular"

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        if self.refuses:
            return self.refuses, {"error": f"no, {TOKEN} may not"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "abc"}


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Run the server in threads of this process."""
    hub = Hub()

    class Answers(Handler):
        def _any(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("authorization")))
            status, told = hub.answer(self.command, path, self.body())
            missing = {"x-error-code": "EntryNotFound"} if status == 404 else {}
            self.send(status, {"x-repo-commit": "abc", "etag": '"abc"', **missing}, told)

        do_GET = do_POST = do_PUT = do_HEAD = _any

    with listening(Answers) as hub.url:
        yield hub
