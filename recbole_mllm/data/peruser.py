# SHIM * -> recbole_mllm.data.histories
import sys

from recbole_mllm.data.histories import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.data.histories"]
