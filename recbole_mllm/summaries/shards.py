# SHIM * -> recbole_mllm.summaries.work_shares
import sys

from recbole_mllm.summaries.work_shares import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.summaries.work_shares"]
