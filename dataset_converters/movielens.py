"""MovieLens in GroupLens's own formats: 100k, 1m, 10m, 20m, 25m and the "latest" sets."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import write_text
from recbole_mllm.data import schema
from recbole_mllm.data.atomic import clean, read_atomic, write_atomic

from .convert import Source
from .interactions import Row, collect, in_time_order
from .item_rows import ItemRow
from .output import dataset_yaml, write_interactions
from .source import NO_NUMBER, Intake, columns, folder_named, number

# u.item ends in one 0/1 column for each of these (ml-100k, u.genre)
# fmt: off
_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one release writes its two files."""

    ratings: str
    movies: str
    ratings_separator: str
    movies_separator: str
    flags: bool  # genres are columns of 0 and 1 rather than names


_LAYOUTS = (
    _Layout("u.data", "u.item", "\t", "|", True),
    _Layout("ratings.dat", "movies.dat", "::", "::", False),
    _Layout("ratings.csv", "movies.csv", ",", ",", False),
)


class MovieLens(Source):
    """Ratings and movies; posters are found by movie id."""

    name = "movielens"
    example = "movielens --raw ml-1m/ --min-rating 4 --out dataset/ml-1m"
    item_kind = "movie"
    features: Mapping[str, str] = {"genres": "token_seq"}

    def __init__(self, raw: Path, images: Path | None, encoding: str | None = None) -> None:
        layouts = [known for known in _LAYOUTS if (raw / known.ratings).exists()]
        if not layouts:
            names = ", ".join(known.ratings for known in _LAYOUTS)
            raise UserError(f"{raw} holds none of {names}; give the unpacked MovieLens folder as --raw")
        if len(layouts) > 1:
            names = " and ".join(known.ratings for known in layouts)
            raise UserError(f"{raw} holds {names}; leave one of them in the folder")
        self._layout = layout = layouts[0]
        self._ratings, self._movies = raw / layout.ratings, raw / layout.movies
        if not self._movies.exists():
            raise UserError(f"{raw} holds {layout.ratings} but no {layout.movies}, from which titles are read")
        super().__init__(images or folder_named(raw, "poster", "image", "cover"))
        self._encoding = encoding or ("utf-8" if _is_utf8(self._movies) else "latin-1")
        self.notes = [f"{self._movies.name} was read as {self._encoding}."]

    @classmethod
    def from_options(cls, raw: Path, images: Path | None, options: Namespace) -> Source:
        """Return the release in a folder."""
        return cls(raw, images, options.encoding)

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield each rating."""
        rows = intake.table(self._ratings, self._layout.ratings_separator)
        for user, item, stars, stamp in columns(rows, intake, "user", "item", "rating", "time"):
            rating, time = number(stars), number(stamp)
            if rating is None or time is None:
                what, text = ("rating", stars) if rating is None else ("timestamp", stamp)
                intake.refuse(f"{what} {text[:40]!r} {NO_NUMBER}")
            else:
                yield Row(user, item, time, float(rating))

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield each movie's title as GroupLens writes it, year included, and its genres."""
        layout = self._layout
        # u.item quotes nothing, though titles hold quotes
        rows = intake.table(self._movies, layout.movies_separator, self._encoding, quoted=not layout.flags)
        if not layout.flags:
            for item, title, genres in columns(rows, intake, "item", "title", "genres"):
                listed = [] if genres.startswith("(no genres") else genres.split("|")
                yield ItemRow(item, title, "", (_words(listed),))
            return
        for row in rows:
            if len(row) == 5 + len(_GENRES):
                flagged = [name for name, flag in zip(_GENRES, row[5:], strict=True) if flag == "1"]
                yield ItemRow(row[0], row[1], "", (_words(flagged),))
            else:
                intake.refuse(f"{len(row)} values where {5 + len(_GENRES)} are expected")


def _words(genres: list[str]) -> str:
    return " ".join(genre.replace(" ", "_") for genre in genres)


def _is_utf8(path: Path) -> bool:
    try:
        if path.is_file():  # else reading it says what is wrong
            path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


# MovieLens-100k as RecBole ships it


def convert_posters(source: Path, folder: Path) -> None:
    """Write the dataset into `folder` (its last part names the files) from RecBole's ``ml-100k`` in `source`.

    Titles are as a person would write them; posters are found by movie id.
    """
    read = read_atomic(source / "ml-100k.inter")
    rows = (Row(row[schema.USER], row[schema.ITEM], int(float(row[schema.TIME]))) for row in read)
    written = write_interactions(folder, in_time_order(collect(rows, Intake())))
    types = {schema.ITEM: "token", schema.TITLE: "token_seq"}
    write_atomic(schema.item_file(folder), types, _titled(source / "ml-100k.item"))
    comment = f"MovieLens-100k in exact time order.\n{written.order}"
    write_text(folder / "dataset.yaml", dataset_yaml(comment, {**written.config, "item_kind": "movie"}))


def _titled(path: Path) -> Iterator[tuple[str, str]]:
    for row in read_atomic(path):
        year = row.get("release_year", "")
        yield row[schema.ITEM], clean(row["movie_title"]) + (f" ({year})" if year else "")
