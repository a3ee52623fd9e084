"""A small dataset in which item n is always followed by item n + 1, written as RecBole's atomic files."""

from pathlib import Path

from PIL import Image

USERS, ITEMS, LENGTH = 30, 60, 7


def item(n: int) -> str:
    """Return the raw id of the n-th item."""
    return f"i{n % ITEMS:02d}"


def write(data_path: Path, name: str = "steps", length: int = LENGTH, images: bool = True) -> Path:
    """Write the dataset; user n starts at item 2n and goes one item further each time."""
    folder = data_path / name
    (folder / "images").mkdir(parents=True)
    rows = [f"u{u:02d}\t{item(2 * u + t)}\t{t + 1}" for u in range(USERS) for t in range(length)]
    (folder / f"{name}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    lines = [f"{item(n)}\ttitle of {item(n)}\timages/{item(n)}.png" for n in range(ITEMS)]
    (folder / f"{name}.item").write_text("item_id:token\ttitle:token_seq\timage:token\n" + "\n".join(lines) + "\n")
    for n in range(ITEMS if images else 0):
        Image.new("RGB", (8, 8), (4 * n, 255 - 4 * n, 90)).save(folder / "images" / f"{item(n)}.png")
    return folder
