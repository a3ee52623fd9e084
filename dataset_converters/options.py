"""The words of ``convert NAME --raw DIR --out DIR``, read into a `Job`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recbole_mllm.common.console import Parser
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.progress import Progress, log_to_terminal
from recbole_mllm.common.resources import named
from recbole_mllm.data.splits import SplitSettings

from .amazon2023 import Amazon2023
from .convert import Converted, Job, Source, add_option, benchmark_command, convert, counts
from .csv_table import CsvTable
from .interactions import Limits
from .item_rows import Downloader
from .microlens import MicroLens
from .movielens import MovieLens
from .output import check
from .source import Intake, moment, number

SOURCES: dict[str, type[Source]] = {source.name: source for source in (MicroLens, MovieLens, Amazon2023, CsvTable)}
"""The converters; a new one is entered here."""

# Options that change what is written, before and behind those of a source itself; where files lie does not
_NARROWING = ("k_core", "min_rating", "max_history", "limit_users", "seed", "duplicates")
_READING = ("encoding", "multiline", "boundaries", "valid_share", "test_share", "target", "max_list")


def main(words: Sequence[str]) -> int:
    """Convert what `words` name and print what was done; return the exit code."""
    log_to_terminal()
    print("\n".join(run(words)[1]))
    return 0


def run(words: Sequence[str]) -> tuple[Converted, list[str]]:
    """Convert what `words` name; return what was done, and the lines that say so.

    Raises:
        UserError: An option, a file or a line is not as it should be.
    """
    known = convert_parser().parse_args(words, argparse.Namespace(words=words))
    raw, folder = Path(known.raw), Path(os.path.abspath(known.out))
    check(folder, [raw])
    source, size = _found(known, raw)
    job = Job(
        source=source,
        folder=folder,
        limits=_limits(known),
        split=split_settings(known),
        item_kind=known.item_kind,
        fetch=Downloader() if getattr(known, "download_images", False) else None,
        options=recorded_options(known, source.recorded),
    )
    with Progress(size / 1e6, f"reading {known.name}", "MB") as progress:
        read = Intake(
            known.skip_bad_rows, lambda count: progress.update(count / 1e6), known.encoding, bool(known.multiline)
        )
        done = convert(job, read)
    command = f"next: {benchmark_command(folder.name, os.path.relpath(folder.parent))} (or --mllm=tiny for a trial)"
    return done, [*source.notes, *counts(done), f"written: {folder}", command]


def recorded_options(known: argparse.Namespace, own: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options that change what is written, a source's `own` too, as README and manifest record them."""
    keys = (*_NARROWING, *own, *_READING)
    given = {key: value for key in keys if (value := getattr(known, key, None)) is not None}
    return {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in given.items()}


def _found(known: argparse.Namespace, raw: Path) -> tuple[Source, int]:
    """Return the source of the raw files at `raw`, and their size in bytes.

    Raises:
        UserError: They are not there, or cannot be read.
    """
    try:
        if not raw.exists():
            raise UserError(f"--raw {raw} does not exist; give the folder of the raw files")
        images = Path(known.image_dir) if known.image_dir else None
        if images is not None and not images.is_dir():
            raise UserError(f"--image-dir {images} is no folder")
        if not raw.is_dir() and not SOURCES[known.name].is_table:
            raise UserError(f"--raw {raw} is no folder; give the folder of the raw files")
        return SOURCES[known.name].from_options(raw, images, known), _bytes(raw)
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--raw {raw} cannot be read: {why}; check its permissions") from None


def _bytes(raw: Path) -> int:
    files = raw.iterdir() if raw.is_dir() else [raw]
    return sum(path.stat().st_size for path in files if path.is_file())


def _limits(known: argparse.Namespace) -> Limits:
    return Limits(
        min_rating=known.min_rating,
        earliest=(known.duplicates or SOURCES[known.name].duplicates) == "first",
        k_core=known.k_core,
        max_history=known.max_history,
        limit_users=known.limit_users,
        seed=known.seed,
    )


def convert_parser() -> Parser:
    """Return the parser of ``convert``."""
    common = Parser(add_help=False)
    common.add_argument("--raw", required=True, metavar="DIR", help="the folder of the raw files; only read")
    common.add_argument(
        "--out", required=True, metavar="DIR", help="the dataset's folder; its last part names the files"
    )
    add_split_options(common)
    add_option(common, "--k-core", type=_core, metavar="U,I", help="least interactions of a user and of an item")
    add_option(common, "--min-rating", type=_rating, metavar="R", help="drop lower ratings")
    add_option(common, "--max-history", type=_positive, metavar="N", help="keep a user's latest N interactions")
    add_option(common, "--limit-users", type=_positive, metavar="N", help="keep a seeded sample of users")
    common.add_argument("--duplicates", choices=("keep", "first"), help="of a user's interactions with one item")
    add_option(
        common, "--image-dir", metavar="DIR", help="images by item id, or that the image column's paths start from"
    )
    add_option(common, "--item-kind", choices=named("prompt"), help="which prompts fit the items (properties/prompt)")
    add_option(
        common, "--skip-bad-rows", action="store_true", help="leave out lines that cannot be read, and list them"
    )
    common.add_argument("--encoding", type=_encoding, help="of the raw files: latin-1, cp1252, utf-16, ...")
    common.add_argument("--multiline", action="store_true", default=None, help="quoted fields may span lines")
    examples = [f"recbole-mllm convert {source.example}" for source in SOURCES.values()]
    parser = Parser(prog="recbole-mllm convert", description="Raw dump to RecBole's atomic files.", examples=examples)
    names = parser.add_subparsers(dest="name", required=True, parser_class=Parser)
    for name, source in SOURCES.items():
        words, example = source.__doc__, f"recbole-mllm convert {source.example}"
        own = names.add_parser(name, parents=[common], help=words, description=words, examples=[example])
        source.add_options(own)
        if source.has_urls:
            add_option(own, "--download-images", action="store_true", help="fetch each item's main image; resumable")
    return parser


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Add the protocol and what it takes."""
    words = "loo: each user's last item; paper: users split 8:1:1; temporal: before and after two moments"
    parser.add_argument("--protocol", choices=("loo", "paper", "temporal"), default="loo", help=words)
    parser.add_argument("--boundaries", type=_moments, metavar="T1,T2", help="the two moments, as times or dates")
    for part in ("valid", "test"):
        words = f"without --boundaries: the share of all interactions in the {part} period (default .1)"
        add_option(parser, f"--{part}-share", type=_share, metavar="S", help=words)
    words = "which of a user's interactions in a period is the target (default last)"
    parser.add_argument("--target", choices=("last", "first", "random"), help=words)
    add_option(parser, "--max-list", type=_positive, metavar="N", help="items of its history that a row lists (100)")
    parser.add_argument("--seed", type=int, default=2024, help="draws samples, users and random targets")


def split_settings(known: argparse.Namespace) -> SplitSettings:
    """Return how the parsed command line splits.

    Raises:
        UserError: Options do not go together.
    """
    names = ("boundaries", "valid_share", "test_share", "target", "max_list")
    given = {name: value for name in names if (value := getattr(known, name)) is not None}
    if given and known.protocol != "temporal":
        raise UserError(f"--{min(given).replace('_', '-')} is of --protocol temporal; add it, or leave the option out")
    if "boundaries" in given and {"valid_share", "test_share"} & set(given):
        raise UserError("--boundaries and shares both say where the moments lie; give one of them")
    settings = SplitSettings(protocol=known.protocol, seed=known.seed, **given)
    if settings.valid_share + settings.test_share >= 1:
        raise UserError("--valid-share and --test-share leave nothing to train on; their sum must be below 1")
    return settings


def _share(text: str) -> float:
    value = number(text)
    if value is None or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share between 0 and 1, such as .1")
    return float(value)


def _moments(text: str) -> tuple[float, float] | tuple[datetime, datetime]:
    first, _, second = text.partition(",")
    one, two = moment(first), moment(second)
    dated = number(first) is None
    if one is None or two is None or dated != (number(second) is None) or one >= two:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no pair of times or of dates T1,T2, the earlier one first")
    return (datetime.fromtimestamp(one, UTC), datetime.fromtimestamp(two, UTC)) if dated else (one, two)


def read_split(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what ``split`` is asked for, and the configuration keys beside it."""
    return split_parser().parse_known_args(words)


def split_parser() -> Parser:
    """Return the parser of ``split``."""
    examples = (
        "recbole-mllm split mine --protocol temporal --out dataset/mine-later",
        "recbole-mllm split mine --protocol temporal --boundaries 2026-06-01,2026-09-01 --out dataset/mine-autumn",
    )
    words = "A new dataset folder with another split of DATASET."
    parser = Parser(prog="recbole-mllm split", description=words, examples=examples)
    parser.add_argument("dataset", metavar="DATASET", help="a dataset's folder, or its name under data_path")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new dataset's folder, whose name is its own")
    add_split_options(parser)
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to 999,999,999")
    return int(text)


def _core(text: str) -> tuple[int, int]:
    user, comma, item = text.partition(",")
    return _positive(user), _positive(item if comma else user)


def _rating(text: str) -> float:
    if (value := number(text)) is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number")
    return float(value)


def _encoding(text: str) -> str:
    try:
        if "a,\n".encode(text).decode(text) == "a,\n":
            return text
    except (LookupError, ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no encoding of text; give one such as utf-8, latin-1 or utf-16")
