"""A real HTTP server on loopback that speaks the chat protocol and misbehaves on plan."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]


@dataclass
class Planned:
    """What was asked, and how the n-th chat request (from 0) is answered; by default with the prompt in capitals."""

    plan: Callable[[int, str], Reply | None] = lambda n, text: None
    decide: Callable[[dict[str, Any]], Reply] | None = None
    decisions: list[dict[str, Any]] = field(default_factory=list)
    models: list[str] | None = field(default_factory=lambda: ["m"])
    posts: dict[str, Callable[[dict[str, Any]], Reply]] = field(default_factory=dict)  # by path
    delay: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def texts(self) -> list[str]:
        """Return what each request asked, images as ``<image>``."""
        return [text_of(body) for body in self.bodies]

    def listed(self) -> Reply:
        """Answer ``/v1/models``."""
        if self.models is None:
            return 500, {}, {"detail": "no listing here"}
        return 200, {}, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]}

    def decision(self, body: dict[str, Any]) -> Reply:
        """Answer ``/v1/systemone``, where `decide` says how."""
        with self.lock:
            self.decisions.append(body)
        return self.decide(body) if self.decide else error(404)

    def chat(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        """Answer ``/v1/chat/completions``."""
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            time.sleep(self.delay)
            return self.plan(number, text_of(body)) or completion(text_of(body).upper())
        finally:
            with self.lock:
                self.active -= 1


def text_of(body: dict[str, Any]) -> str:
    """Return the request's text."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def completion(text: str, reason: str = "stop", usage: bool = True) -> Reply:
    """Return a chat completion."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    if usage:
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return 200, {}, body


def error(status: int, message: str = "no", **headers: str) -> Reply:
    """Return an error as OpenAI's servers write it; underscores in header names are dashes."""
    return status, {k.replace("_", "-"): v for k, v in headers.items()}, {"error": {"message": message}}


class Handler(BaseHTTPRequestHandler):
    """Reads a request's whole body, and sends JSON or bytes."""

    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        """Read what was sent."""
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def send(self, status: int, headers: Mapping[str, str], body: Any) -> None:
        """Send a whole answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        pass


@contextmanager
def listening(handler: Callable[..., BaseHTTPRequestHandler], port: int = 0) -> Iterator[str]:
    """Run a server in threads of this process; yield its address."""
    server = _Server(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(planned: Planned, port: int = 0) -> Iterator[Planned]:
    """Speak the chat protocol as `planned`."""

    class Chat(Handler):
        def do_GET(self) -> None:
            self.send(*(planned.listed() if self.path == "/v1/models" else error(404)))

        def do_POST(self) -> None:
            body = json.loads(self.body())
            if self.path in planned.posts:
                reply = planned.posts[self.path](body)
            elif self.path == "/v1/systemone":
                reply = planned.decision(body)
            elif self.path == "/v1/chat/completions":
                reply = planned.chat(body, {name.lower(): value for name, value in self.headers.items()})
            else:
                reply = error(404)
            self.send(*reply)

    with listening(Chat, port) as url:
        planned.url = f"{url}/v1"
        yield planned
