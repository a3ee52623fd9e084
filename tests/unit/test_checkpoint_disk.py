"""A disk that is full, or a folder that cannot be written, costs a training one line and no earlier checkpoint."""

import pytest
import torch
from full_disk import files_up_to
from safetensors.torch import save_file

from recbole_mllm.common.checkpoint import on_disk, whole_folder, write_checkpoint
from recbole_mllm.common.errors import UserError


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(tmp_path):
    path, folder = tmp_path / "run.pth", tmp_path / "run"

    def write(size):
        write_checkpoint({"weight": torch.zeros(size)}, path)

    def adapt(size):
        with whole_folder(folder) as fresh:
            save_file({"weight": torch.zeros(size)}, fresh / "adapter.safetensors")

    write(10)
    adapt(10)
    before = path.read_bytes(), (folder / "adapter.safetensors").read_bytes()
    with files_up_to(50_000):
        with pytest.raises(UserError, match=rf"checkpoint {path} cannot be written \(File too large\); make room"):
            write(100_000)
        with pytest.raises(UserError, match=rf"checkpoint {folder} cannot be written \(.*--checkpoint_dir"):
            adapt(100_000)
    assert before == (path.read_bytes(), (folder / "adapter.safetensors").read_bytes())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run", "run.pth"]


def test_what_is_not_the_disks_doing_is_not_blamed_on_it(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "saved"
    with pytest.raises(UserError, match=r"file/saved cannot be written \(Not a directory\)"), on_disk(folder):
        folder.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="a bug"), on_disk(tmp_path):
        raise RuntimeError("a bug")
