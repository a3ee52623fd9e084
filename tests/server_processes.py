"""Servers as processes of their own, which can be slow, hang, answer errors alone, be killed and started again.

Run as a script it serves: ``server_processes.py PORT DELAY KIND LOG``; the log gets a line a request: its text.
"""

import hashlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from planned_server import Planned, Reply, completion, error, serving


def reply(text: str) -> str:
    """Return what every server says to `text`."""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]} is what I read"


class Served:
    """One process; `url` stays the same when it is started again."""

    def __init__(self, folder: Path, name: str, delay: float = 0.05, kind: str = "well") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.delay, self.kind, self.log = delay, kind, folder / f"{name}.log"
        self.log.touch()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        words = [str(self.port), str(self.delay), self.kind, str(self.log)]
        self.process = subprocess.Popen([sys.executable, __file__, *words])
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def asked(self) -> list[str]:
        """Return the texts it was asked."""
        return self.log.read_text().splitlines()


@contextmanager
def served(folder: Path, **kinds: tuple[float, str]) -> Iterator[dict[str, Served]]:
    """Run a server for each name, given its delay in seconds and its kind: ``well``, ``hang`` or a status."""
    found: dict[str, Served] = {}
    try:
        for name, (delay, kind) in kinds.items():
            found[name] = Served(folder, name, delay, kind)
        yield found
    finally:
        for server in found.values():
            server.kill()


def _serve(port: int, delay: float, kind: str, log: Path) -> None:
    def plan(number: int, text: str) -> Reply:
        with log.open("a") as file:
            file.write(text.replace("\n", " ") + "\n")
        if kind == "hang":
            time.sleep(3600)
        return completion(reply(text)) if kind == "well" else error(int(kind), "out of order")

    with serving(Planned(plan, delay=delay), port):
        time.sleep(3600)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
