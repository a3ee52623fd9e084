# SHIM * -> recbole_mllm.summaries.store_tools
import sys

from recbole_mllm.summaries.store_tools import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.summaries.store_tools"]
