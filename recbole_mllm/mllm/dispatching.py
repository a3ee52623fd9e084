# SHIM * -> recbole_mllm.mllm.placement
import sys

from recbole_mllm.mllm.placement import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.placement"]
