"""A local cache of the hub as huggingface_hub lays it out, with commits of a model made by hand."""

import hashlib
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


class HubCache:
    """The cached commits of the model `name`; the newest one planted is its main branch."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._place = folder / f"models--{name.replace('/', '--')}"

    def plant(self, source: Path, shift: float = 0.0) -> str:
        """Commit the files of the folder `source`, their weights shifted by as much; return the commit's hash."""
        commit = hashlib.sha1(f"{source}{shift}".encode()).hexdigest()
        snapshot = self._place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copy(path, snapshot / path.name)
        if shift:
            weights = load_file(snapshot / "model.safetensors")
            shifted = {key: value + shift if value.is_floating_point() else value for key, value in weights.items()}
            save_file(shifted, snapshot / "model.safetensors", metadata={"format": "pt"})
        self.move("main", commit)
        return commit

    def move(self, branch: str, commit: str) -> None:
        """Let a branch or tag point to `commit`."""
        ref = self._place / "refs" / branch
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(commit)

    def forget(self) -> None:
        """Forget which commit the main branch is."""
        (self._place / "refs" / "main").unlink()
