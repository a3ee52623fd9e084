"""A server on loopback that speaks as much of the hub as creating a repository and committing files to it takes."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("authorization")))
            status, told = hub.answer(self.command, path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("x-repo-commit", "abc")
            if status == 404:
                self.send_header("x-error-code", "EntryNotFound")
            self.send_header("etag", '"abc"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _any

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
