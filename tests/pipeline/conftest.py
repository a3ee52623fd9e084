"""The world of the pipeline's tests: the small dataset, and two tiny models."""

from pathlib import Path

import pytest
import small_world
import tiny_models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `steps` in ``data``, and the models ``llama`` (text alone) and ``llava``."""
    folder = tmp_path_factory.mktemp("world")
    small_world.write(folder / "data")
    tiny_models.llama(folder / "llama")
    tiny_models.llava(folder / "llava")
    return folder
