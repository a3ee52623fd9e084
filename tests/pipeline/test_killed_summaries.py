"""``kill -9`` at random moments: nothing that was stored is lost, no byte is another."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import yaml
from planted_writers import Planted
from recbole_mllm.data.item_table import Items
from recbole_mllm.common.prompts import Style
from recbole_mllm.common.resources import PROPERTIES
from recbole_mllm.common.settings import SummarySettings
from recbole_mllm.summaries.generator import SummarySetup, Summarizers
from recbole_mllm.summaries.preferences import make_preferences
from recbole_mllm.summaries.user_summaries import SummaryRequests

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
style = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
keys = yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text())
settings = SummarySettings.from_config(keys | {{"item_summary": "text", "block_size": 2}})
histories = {{f"u{{u}}": [f"i{{(u * n + n) % 60}}" for n in range(3 + u % 9)] for u in range(120)}}
items = Items({{f"i{{n}}": f"title {{n}}" for n in range(60)}}, {{}})

def reply(prompt):
    time.sleep(pause)
    print("answered", flush=True)
    return str(sum(map(ord, prompt.text)) % 10_007) + " is what I read"

who = Summarizers("planted", "planted", lambda: Planted(reply, 2), lambda: Planted(reply, 2))
plan = SummaryRequests(histories, {{user: set(range(1, len(h) + 1)) for user, h in histories.items()}})
make_preferences(SummarySetup(folder, "t", style, items, settings, who), plan)
print("finished", flush=True)
"""


def start(folder: Path, pause: float) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    code = SCRIPT.format(tests=str(HERE), root=str(HERE.parent))
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(pause)], stdout=subprocess.PIPE, text=True)


def summaries(folder: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes() for path in folder.glob("*.?sum")}


def test_kills_lose_nothing_that_was_stored_and_change_no_byte(tmp_path: Path) -> None:
    straight = start(tmp_path / "straight", 0.0)
    wanted = straight.communicate(timeout=120)[0].count("answered")
    rng, asked, kills = random.Random(5), 0, 0
    folder = tmp_path / "killed"
    while kills < 10:
        process = start(folder, 0.006)
        assert process.stdout is not None
        assert process.stdout.readline() in ("answered\n", "finished\n")
        time.sleep(rng.uniform(0.0, 0.35))
        done = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        asked += process.communicate()[0].count("answered") + 1
        assert not done, "the work was over before it could be killed often enough; make it longer"
        kills += 1
    last = start(folder, 0.0)
    asked += last.communicate(timeout=120)[0].count("answered")
    assert last.returncode == 0
    assert {path.name.split(".", 1)[1] for path in folder.glob("*sum")} == {"t.isum", "t.usum"}
    assert summaries(folder) == summaries(tmp_path / "straight") and len(summaries(folder)) == 2
    assert wanted <= asked <= wanted + 11 * 40  # at most what had not been committed is asked again
    assert not list(folder.glob(".*tmp"))
