# SHIM * -> recbole_mllm.common.config
import sys

from recbole_mllm.common.config import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.config"]
