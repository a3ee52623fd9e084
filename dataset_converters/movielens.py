"""MovieLens in GroupLens's own formats: 100k, 1m, 10m, 20m, 25m and the "latest" sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dataset_converters.catalog import ItemRow
from dataset_converters.finding import first_of, folder_named
from dataset_converters.intake import Intake
from dataset_converters.interactions import Row
from dataset_converters.values import number
from recbole_mllm.errors import UserError

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
    genres: Callable[[list[str]], list[str]]
    columns: int | None
    header: bool


def _flags(row: list[str]) -> list[str]:
    return [name for name, flag in zip(_GENRES, row[5:], strict=False) if flag == "1"]


def _listed(row: list[str]) -> list[str]:
    return [] if row[2].startswith("(no genres") else row[2].split("|")


_LAYOUTS = (
    _Layout("u.data", "u.item", "\t", "|", _flags, 24, False),
    _Layout("ratings.dat", "movies.dat", "::", "::", _listed, 3, False),
    _Layout("ratings.csv", "movies.csv", ",", ",", _listed, 3, True),
)


class MovieLens:
    """Ratings and movies; posters are found by movie id."""

    name = "movielens"
    item_kind = "movie"
    features: Mapping[str, str] = {"genres": "token_seq"}
    has_urls = False

    def __init__(self, raw: Path, images: Path | None) -> None:
        layout = next((known for known in _LAYOUTS if (raw / known.ratings).is_file()), None)
        if layout is None:
            names = ", ".join(known.ratings for known in _LAYOUTS)
            raise UserError(f"{raw} holds none of {names}; give the unpacked MovieLens folder as --raw")
        movies = first_of(raw, layout.movies)
        if movies is None:
            raise UserError(f"{raw} holds {layout.ratings} but no {layout.movies}, from which titles are read")
        self._layout, self._ratings, self._movies = layout, raw / layout.ratings, movies
        self._images = images or folder_named(raw, "poster", "image", "cover")
        self._encoding = "utf-8" if _is_utf8(movies) else "latin-1"
        self.notes = [f"{movies.name} was read as {self._encoding}."]

    def interactions(self, intake: Intake) -> Iterator[Row]:
        """Yield each rating."""
        rows = intake.table(self._ratings, self._layout.ratings_separator)
        for place, row in enumerate(rows):
            if place == 0 and self._layout.header:
                continue
            if len(row) != 4:
                intake.refuse(f"{len(row)} values where user, movie, rating and timestamp are expected")
                continue
            rating, time = number(row[2]), number(row[3])
            if rating is None or time is None:
                intake.refuse(f"rating {row[2][:40]!r} or timestamp {row[3][:40]!r} is no number")
                continue
            yield Row(row[0], row[1], time, float(rating))

    def items(self, intake: Intake) -> Iterator[ItemRow]:
        """Yield each movie's title as GroupLens writes it, year included, and its genres."""
        layout = self._layout
        # u.item quotes nothing, though titles hold quotes
        rows = (
            intake.table(self._movies, ",", self._encoding)
            if layout.header
            else (line.split(layout.movies_separator) for line in intake.lines(self._movies, self._encoding) if line)
        )
        for place, row in enumerate(rows):
            if place == 0 and layout.header:
                continue
            if len(row) != layout.columns:
                intake.refuse(f"{len(row)} values where {layout.columns} are expected")
                continue
            yield ItemRow(row[0], row[1], "", (" ".join(g.replace(" ", "_") for g in layout.genres(row)),))

    def images(self) -> Path | None:
        """Return the posters' folder."""
        return self._images


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
