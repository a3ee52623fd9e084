"""Draw the README's pictures of the report: the top of a leaderboard.html in Chromium, light and dark, as small PNGs.

python tools/report_picture.py results/demo docs/images
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1280, 1050
LARGEST = 300_000
"""Bytes that a picture may have."""


def draw(page: Path, out: Path, scheme: str, height: int) -> int:
    """Write the top of `page` to `out` as ``report-<scheme>.png``; return its size in bytes.

    Raises:
        SystemExit: There is no Chromium, or it drew nothing.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no chromium on this machine (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.png"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={scratch}/profile", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--window-size={WIDTH},{height}", "--virtual-time-budget=3000", f"--screenshot={raw}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, timeout=120, check=False)
        if not raw.is_file():
            raise SystemExit(f"{browser} drew nothing of {page}")
        target = out / f"report-{scheme}.png"
        with Image.open(raw) as picture:  # flat colours: a palette halves the file and is not seen
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    return target.stat().st_size


def main() -> int:
    """Draw both; return 1 if one is larger than `LARGEST`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder with leaderboard.html")
    parser.add_argument("out", type=Path, help="where report-light.png and report-dark.png are written")
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels of the page from its top (%(default)s)")
    known = parser.parse_args()
    page = (known.results / "leaderboard.html").resolve(strict=True)
    sizes = {scheme: draw(page, known.out, scheme, known.height) for scheme in ("light", "dark")}
    print(*(f"{known.out}/report-{scheme}.png: {size / 1e3:.0f} kB" for scheme, size in sizes.items()), sep="\n")
    return int(max(sizes.values()) > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
