# SHIM * -> recbole_mllm.summaries.store
import sys

from recbole_mllm.summaries.store import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.summaries.store"]
