# SHIM * -> recbole_mllm.mllm.memory
import sys

from recbole_mllm.mllm.memory import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.memory"]
