"""Datasets that are built on first use: the demo worlds, and MovieLens-100k from the files RecBole ships."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from recbole_mllm.common.config import recbole_home
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import BUILTIN, check_place, publish_new, staged, write_text
from recbole_mllm.common.resources import converters
from recbole_mllm.data.schema import INTER_TYPES, item_file, title_column
from recbole_mllm.demo.attributes import BRANDS, VALUES

DEMO_SEED = 1  # the world behind the plain name `demo`; `demo-7` is the world of seed 7
_DEMO = re.compile(r"demo(?:-(\d+))?")
_TITLE = re.compile(f"({'|'.join(BRANDS)}) ({'|'.join(VALUES['theme'])}) edition")

DEMO_COMMENT = "A made world: the images carry the taste, the titles do not (docs/tiny-mllm.md)."


def is_builtin(name: str) -> bool:
    """Return whether a dataset of this name can be built here."""
    return name == "ml-100k-posters" or is_demo(name)


def is_demo(name: str) -> bool:
    """Return whether a dataset of this name is a demo world, on which the bundled MLLM is the default."""
    return _DEMO.fullmatch(name) is not None


def preset_of(name: str) -> str | None:
    """Return the preset that goes with a built-in dataset."""
    return None if not is_builtin(name) else "ml-100k-posters" if name == "ml-100k-posters" else "demo"


def is_demo_world(folder: Path) -> bool:
    """Return whether the dataset in `folder` is a demo world, whatever it is called, whole or split.

    Its titles tell; the name alone does where they cannot be read, as where results lie on another machine.
    """
    from recbole_mllm.data.atomic import read_columns, read_numbered  # numpy, for which `--help` does not wait

    with suppress(OSError, UserError):
        path = item_file(folder)
        title = title_column(read_columns(path))
        return title is not None and all(_TITLE.fullmatch(row[title]) for _, row in read_numbered(path))
    return _DEMO.fullmatch(folder.name) is not None


def ensure_builtin(folder: Path) -> None:
    """Build the dataset that `folder` is named after, if it is one of ours and not there yet; whole or not at all."""
    if is_builtin(folder.name) and not (folder / f"{folder.name}.inter").is_file():
        _whole(folder, _demo if is_demo(folder.name) else _movies)


def _demo(folder: Path) -> None:
    from recbole_mllm.demo.world import write_demo_dataset

    _, _, seed = folder.name.partition("-")
    write_demo_dataset(folder, int(seed or DEMO_SEED))
    text = converters("output").dataset_yaml(
        DEMO_COMMENT, {"load_col": {"inter": list(INTER_TYPES)}, "item_kind": "product"}
    )
    write_text(folder / "dataset.yaml", text)


def _movies(folder: Path) -> None:
    source = recbole_home() / "dataset_example" / "ml-100k"
    if not source.is_dir():
        raise UserError(
            "RecBole's bundled ml-100k is not there; install it with `pip install --no-deps recbole==1.2.1`"
        )
    converters("movielens").convert_posters(source, folder)


def _whole(folder: Path, build: Callable[[Path], None]) -> None:
    """Build in a folder beside, then rename; another process that was faster wins."""
    check_place(folder.parent, "data_path")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder.parent, folder.name) as stage:
        build(stage)
        about = {"builtin": folder.name, "outputs": [{"file": path.name} for path in sorted(stage.iterdir())]}
        write_text(stage / BUILTIN.manifest, json.dumps(about, indent=1) + "\n")
        try:
            publish_new(stage, folder)
        except OSError:
            if not (folder / f"{folder.name}.inter").is_file():
                raise UserError(
                    f"{folder} exists but holds no {folder.name}.inter; move it away and try again"
                ) from None
