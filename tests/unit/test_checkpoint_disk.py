"""A disk that is full, or a folder that cannot be written, costs a training one line and no earlier checkpoint."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recbole_mllm.common.errors import UserError
from recbole_mllm.training.checkpoint import on_disk

ROOT = Path(__file__).resolve().parents[2]

FULL = """
    import resource, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from recbole_mllm.common.errors import UserError
    from recbole_mllm.training.checkpoint import whole_folder, write_checkpoint
    path, folder = Path(sys.argv[1]) / "run.pth", Path(sys.argv[1]) / "run"
    def adapter(size):
        with whole_folder(folder) as fresh:
            save_file({"weight": torch.zeros(size)}, fresh / "adapter.safetensors")
    write_checkpoint({"weight": torch.zeros(10)}, path), adapter(10)
    before = path.read_bytes(), (folder / "adapter.safetensors").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # as a full disk, for files that grow beyond it
    for write in (lambda: write_checkpoint({"weight": torch.zeros(100_000)}, path), lambda: adapter(100_000)):
        try:
            write()
        except UserError as error:
            print(error)
    assert before == (path.read_bytes(), (folder / "adapter.safetensors").read_bytes())
    assert sorted(entry.name for entry in Path(sys.argv[1]).iterdir()) == ["run", "run.pth"]
"""


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    of_run, of_adapter = done.stdout.splitlines()
    assert of_run.startswith(f"checkpoint {tmp_path}/run.pth cannot be written (File too large); make room")
    assert of_adapter.startswith(f"checkpoint {tmp_path}/run cannot be written (") and "--checkpoint_dir" in of_adapter


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "saved"
    with pytest.raises(UserError, match=r"file/saved cannot be written \(Not a directory\)"), on_disk(folder):
        folder.mkdir(parents=True)


def test_what_is_not_the_disks_doing_is_not_blamed_on_it(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), on_disk(tmp_path):
        raise RuntimeError("a bug")
