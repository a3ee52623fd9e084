# SHIM * -> recbole_mllm.summaries.item_summaries
import sys

from recbole_mllm.summaries.item_summaries import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.summaries.item_summaries"]
