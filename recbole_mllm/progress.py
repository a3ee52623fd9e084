# SHIM * -> recbole_mllm.common.progress
import sys

from recbole_mllm.common.progress import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.progress"]
