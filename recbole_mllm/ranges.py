# SHIM * -> recbole_mllm.common.settings
import sys

from recbole_mllm.common.settings import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.settings"]
