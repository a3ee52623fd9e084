"""Random atomic files with everything that makes RecBole's code branch: short users, ties in time, gaps, sequences."""

from pathlib import Path

import numpy as np

INTER = "user_id:token\titem_id:token\ttimestamp:float\trating:float\ttag:token\twords:token_seq\tnumbers:float_seq"


def write(data_path: Path, name: str, seed: int, users: int = 40, items: int = 30, longest: int = 9) -> None:
    """Write the dataset `name`: users with 1 to `longest` interactions, the first three with 1, 2 and 3."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = user + 1 if user < 3 else int(rng.integers(1, longest + 1))
        times = rng.integers(0, 6, length) * 50 + 1_600_000_000
        rows += [
            _row(rng, f"u{user}", f"i{item}", time)
            for item, time in zip(_items(rng, items, length), times, strict=True)
        ]
    rng.shuffle(rows)
    folder = Path(data_path) / name
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.inter").write_text("\n".join([INTER, *rows]) + "\n", encoding="utf-8")
    named = [f"i{n}\tkind {n % 3}\t{rng.random():.3f}" for n in rng.permutation(items)]
    (folder / f"{name}.item").write_text("\n".join(["item_id:token\tclass:token_seq\tprice:float", *named]) + "\n")
    aged = [f"u{n}\t{rng.integers(18, 20)}" for n in rng.permutation(users)]
    (folder / f"{name}.user").write_text("\n".join(["user_id:token\tage:token", *aged]) + "\n")


def _items(rng: np.random.Generator, items: int, length: int) -> list[int]:
    """Some items are met twice."""
    return [int(item) for item in (rng.random(length) ** 2 * items)]


def _row(rng: np.random.Generator, user: str, item: str, time: int) -> str:
    rating = "" if rng.random() < 0.1 else f"{rng.integers(1, 6)}"
    tag = "" if rng.random() < 0.2 else f"t{rng.integers(4)}"
    words = " ".join(f"w{n}" for n in rng.integers(0, 5, int(rng.integers(0, 4))))
    numbers = " ".join(f"{n:.2f}" for n in rng.random(3))
    return f"{user}\t{item}\t{time}\t{rating}\t{tag}\t{words}\t{numbers}"
