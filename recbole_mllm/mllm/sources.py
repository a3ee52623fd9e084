# SHIM * -> recbole_mllm.mllm.loading
import sys

from recbole_mllm.mllm.loading import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.loading"]
