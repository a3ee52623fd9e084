"""Convert Amazon-shaped dumps of growing size: seconds and peak memory must grow no faster than the rows.

    python benchmarks/convert.py           # 100 k, 300 k and 1 M reviews
    python benchmarks/convert.py --full    # 1 M, 3 M and 10 M

Each size is a process of its own, so that its peak is its own. Ends with one JSON line for the largest size.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = (100_000, 300_000, 1_000_000)
FULL = (1_000_000, 3_000_000, 10_000_000)
ROWS_PER_ITEM = 10
REVIEW = "Works as described, arrived on time, and the colour is the one in the picture. " * 3


def write_dump(folder: Path, rows: int) -> None:
    """Write `rows` reviews by rows / 5 users of rows / 10 items, a few popular, and a description of most items."""
    rng = random.Random(rows)
    items, users = rows // ROWS_PER_ITEM, rows // 5
    with (folder / "Made.jsonl").open("w") as file:
        for _ in range(rows):
            item, user = int(items * rng.random() ** 2), rng.randrange(users)
            stamp = 1_400_000_000_000 + rng.randrange(300_000_000_000)
            file.write(
                f'{{"rating": {rng.randrange(1, 6)}.0, "title": "Fine", "text": "{REVIEW}", "images": [], '
                f'"asin": "B{item:09d}", "parent_asin": "B{item:09d}", "user_id": "AE{user:026d}", '
                f'"timestamp": {stamp}, "helpful_vote": 0, "verified_purchase": true}}\n'
            )
    with (folder / "meta_Made.jsonl").open("w") as file:
        for item in range(items):
            image = {"thumb": f"https://a.test/{item}._SS40_.jpg", "large": f"https://a.test/{item}.jpg"}
            record = {
                "main_category": "Toys",
                "title": f"Wooden train number {item}, with 12 wagons and a bridge",
                "features": ["Made of beech", "For children of three and above"],
                "description": ["A train that goes round and round. " * 8],
                "price": 12.5,
                "images": [{**image, "variant": "MAIN", "hi_res": None}],
                "store": "Makers",
                "categories": ["Toys & Games", "Trains"],
                "parent_asin": f"B{item:09d}",
            }
            file.write(json.dumps(record) + "\n")


def measure(rows: int) -> dict[str, float]:
    """Convert a dump of `rows` in a child process; return its seconds and peak memory."""
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name, "raw")
        raw.mkdir()
        write_dump(raw, rows)
        words = [sys.executable, __file__, "--convert", str(raw), str(Path(name, "made"))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))


def convert(raw: str, out: str) -> None:
    """Convert in this process and tell what it took."""
    sys.path.insert(0, str(HERE.parent))
    from dataset_converters.options import main

    started = time.perf_counter()
    main(["amazon2023", "--raw", raw, "--out", out])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": round(time.perf_counter() - started, 2), "peak_mb": round(peak)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--convert", nargs=2, metavar=("RAW", "OUT"), help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.convert:
        convert(*known.convert)
        return
    for rows in FULL if known.full else SIZES:
        found = {"rows": rows, **measure(rows)}
        found["rows_per_s"] = round(rows / found["seconds"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
