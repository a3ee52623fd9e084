"""What is shown of a run in a process of its own: its own words."""

import sys
import threading

from recbole_mllm.benchmark.process import LOG, failure, run_child

SCRIPT = """
import time, warnings
print("epoch 3 training", flush=True)
warnings.warn("old ways are deprecated", FutureWarning)
time.sleep({pause})
raise SystemExit({code})
"""


def test_the_line_shown_and_the_last_words_are_the_runs_own_and_no_warning(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT.format(pause=0.6, code=3))
    shown = []
    command = [sys.executable, str(script)]
    code = run_child(command, tmp_path, None, threading.Event(), lambda seconds, line: shown.append(line))
    log = tmp_path / LOG
    assert "worker.py:4: FutureWarning: old ways" in log.read_text() and 'warnings.warn("old' in log.read_text()
    assert shown[-1] == "epoch 3 training" and set(shown) <= {"", "epoch 3 training"}
    assert code == 3 and failure(log, code) == "epoch 3 training"
    log.write_text("ValueError: no such thing\n")
    assert failure(log, 1) == "ValueError: no such thing"
