# SHIM * -> recbole_mllm.mllm.server_scoring
import sys

from recbole_mllm.mllm.server_scoring import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.server_scoring"]
