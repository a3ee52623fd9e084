"""A real `transformers serve` of one model as a process, which can be killed and started again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class TransformersServe:
    """`transformers serve` of `model`, in float32 on the CPU, on a port of its own; `folder` gets its log."""

    def __init__(self, model: str | Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.folder = model, folder
        self.endpoint = f"server:{model}@http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        """Start it."""
        command = ["-m", "transformers.cli.transformers", "serve", str(self.model), "--device", "cpu"]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"HF_HUB_CACHE": str(self.folder / "hub"), "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)

    def wait(self) -> TransformersServe:
        """Wait until it answers, minutes where the machine is busy."""
        for _ in range(2400):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return self
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> TransformersServe:
        try:
            return self.wait()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
