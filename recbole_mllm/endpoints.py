# SHIM * -> recbole_mllm.common.endpoints
import sys

from recbole_mllm.common.endpoints import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.endpoints"]
