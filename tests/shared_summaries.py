"""Writes the summaries of a planted world in as many processes as a launcher starts.

``torchrun … shared_summaries.py FOLDER PAUSE KILLED AFTER``: each prompt takes PAUSE seconds, and is noted in
``FOLDER.asked/<rank>``; process KILLED kills itself after so many prompts.
"""

import hashlib
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from planted_writers import Planted  # noqa: E402

from recbole_mllm.common import distributed  # noqa: E402
from recbole_mllm.common.prompts import Prompt, Style  # noqa: E402
from recbole_mllm.common.resources import PROPERTIES  # noqa: E402
from recbole_mllm.common.settings import SummarySettings  # noqa: E402
from recbole_mllm.data.item_table import Items  # noqa: E402
from recbole_mllm.summaries.generator import Summarizer, SummarySetup  # noqa: E402
from recbole_mllm.summaries.preferences import refresh  # noqa: E402
from recbole_mllm.summaries.user_summaries import SummaryRequests  # noqa: E402


def write(folder: Path, pause: float, killed: int, after: int) -> None:
    """Make all summaries of the world: half of its users begin like another one."""
    rank, notes = int(os.environ.get("RANK", "0")), folder.with_name(f"{folder.name}.asked")
    folder.mkdir(exist_ok=True)
    notes.mkdir(exist_ok=True)
    asked = [0]

    def reply(prompt: Prompt) -> str:
        time.sleep(pause)
        asked[0] += 1
        if rank == killed and asked[0] > after:
            os.kill(os.getpid(), signal.SIGKILL)
        with (notes / str(rank)).open("a") as file:
            file.write(hashlib.sha256(prompt.text.encode()).hexdigest() + "\n")
        return f"it says {hashlib.sha256(prompt.text.encode()).hexdigest()[:20]}"

    style = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
    keys = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text())
    settings = replace(SummarySettings.from_config(keys), item_summary="text")
    rng = random.Random(3)
    histories = {f"u{u}": [f"i{rng.randrange(80)}" for _ in range(rng.randint(3, 12))] for u in range(60)}
    for user in range(0, 60, 2):
        histories[f"u{user}"][:5] = histories[f"u{(user + 10) % 60}"][:5]
    writer = Planted(reply, 2)
    who = dict.fromkeys(("item", "user"), Summarizer("planted", lambda: writer))
    items = Items({f"i{n}": f"title {n // 2}" for n in range(80)}, {})
    plan = SummaryRequests(histories, {user: set(range(1, len(history))) for user, history in histories.items()})
    known, _ = refresh(SummarySetup(folder, "t", style, items, settings, who), plan)
    assert all(known.of(user, place) for user, places in plan.positions.items() for place in places)


def _run(words: list[str]) -> int:
    write(Path(words[0]), float(words[1]), int(words[2]), int(words[3]))
    return 0


if __name__ == "__main__":
    sys.exit(distributed.exit_code(_run, sys.argv[1:]))
